"""Texts as a model reads them: its prompt before them, and its limit of tokens."""

from collections.abc import Sequence
from typing import Any

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.sections import DataSettings
from lora_jax.models.loaded import LoadedModel


def max_tokens(
    data: DataSettings, loaded: LoadedModel, default: int
) -> tuple[int, str, list[tuple[str, str]]]:
    """Returns the maximum tokens per example, a description of it, and remarks.

    It is ``data.max_length`` or ``default``, but at most the model's context length.
    """
    longest = loaded.config.max_positions
    asked = default if data.max_length is None else data.max_length
    if asked <= longest:
        return asked, f"data.max_length = {asked}", []
    name = f"{longest} tokens, the model's context"
    if data.max_length is None:
        return longest, name, []
    note = f"{name}; data.max_length = {asked} is more"
    return longest, name, [("max length", note)]


def prompt_of(loaded: LoadedModel, name: str | None) -> str:
    """Returns an embedding model's prompt; of None its default one, or no text."""
    if loaded.sentence is None and name is None:
        return ""
    if loaded.sentence is None:
        raise UserError(f"{loaded.path} has no prompts; got {name!r}.")
    try:
        return loaded.sentence.prompt(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def with_prompt(
    loaded: LoadedModel, texts: Sequence[str], name: str | None
) -> list[str]:
    """Puts a prompt before texts, and all in lower case if the model wants it."""
    before = prompt_of(loaded, name)
    whole = [before + text for text in texts]
    is_lower_case = loaded.sentence is not None and loaded.sentence.is_lower_case
    return [text.lower() for text in whole] if is_lower_case else whole


def encode_texts(
    loaded: LoadedModel, texts: list[str], *, max_length: int | None
) -> Any:
    """Returns token ids of texts, truncated to the model's and settings' limits."""
    if loaded.tokenizer is None:
        raise UserError(
            f"{loaded.path} must contain a tokenizer.json to read text; it has none."
        )
    longest = loaded.config.max_positions
    return loaded.tokenizer.encode(
        texts, max_length=min(max_length or longest, longest)
    )
