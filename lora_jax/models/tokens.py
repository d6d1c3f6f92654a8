"""Tokens of a `LoRAConfig`, by their text, in a model's own vocabulary."""

import dataclasses

from lora_jax.config import LoRAConfig
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.models.added_tokens import train_added
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.target_names import translate_names
from lora_jax.tree.paths import nearest


def localize(config: LoRAConfig, loaded: LoadedModel) -> LoRAConfig:
    """Returns a config in a model's own names: of modules, and ids of tokens.

    Args:
      config: may use Hugging Face's names, see `translate_names`, and text in
        ``tokens``, see `name_tokens`. The rows of the model's new tokens are trained
        too.
      loaded: the model.
    """
    config = translate_names(config, loaded.family, loaded.config)
    size = getattr(loaded.config, "vocab_size", None)
    config = name_tokens(config, loaded.tokenizer, size)
    if loaded.added and loaded.tokenizer is not None:
        ids = [loaded.tokenizer.token_id(token) or 0 for token in loaded.added]
        is_tied = loaded.config.is_tied
        config = dataclasses.replace(
            config, tokens=train_added(config, ids, is_tied=is_tied)
        )
    return config


def name_tokens(
    config: LoRAConfig, tokenizer: Tokenizer | None, vocab_size: int | None
) -> LoRAConfig:
    """Replaces the tokens that a config gives as text by their ids.

    Args:
      config: its ``tokens`` may be ids, or tokens exactly as the tokenizer has them.
      tokenizer: the model's, or None.
      vocab_size: number of rows of the model's table; None if it has none.

    Returns:
      The config, with ids alone.

    Raises:
      ValueError: listing every token that is unknown or given twice, and every id
        without a row.
    """
    faults, found = [], {}
    for layer, tokens in config.tokens_by_layer.items():
        ids: dict[int, int | str] = {}
        for token in tokens:
            if isinstance(token, int):
                known = token
            elif tokenizer is None:
                faults.append(f"{token!r} must be an id: the model has no tokenizer")
                continue
            elif (known := tokenizer.token_id(token)) is None:
                hint = nearest(token, tokenizer.added_tokens)
                faults.append(
                    f"{token!r} is not a token of {tokenizer.path}"
                    + (f". Did you mean: {hint}?" if hint else "")
                )
                continue
            if known in ids:
                faults.append(f"{token!r} and {ids[known]!r} are one token, {known}")
            elif vocab_size is not None and known >= vocab_size:
                faults.append(f"{token!r} must have a row in the table of {vocab_size}")
            else:
                ids[known] = token
        found[layer] = tuple(ids)
    if faults:
        raise ValueError(f"tokens: {'; '.join(faults)}.")
    return dataclasses.replace(config, tokens=found)
