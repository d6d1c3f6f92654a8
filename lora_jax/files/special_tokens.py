"""Special tokens and the chat template that a model folder has beside its tokenizer.

They are spread over several files: the tokens' text in ``tokenizer_config.json``, the
ids that end a generation in ``generation_config.json`` (or ``config.json``), the chat
template in ``chat_template.jinja`` or ``tokenizer_config.json``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.files.json_file import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"


class SpecialTokens(NamedTuple):
    """A tokenizer's special tokens.

    Attributes:
      bos_id: of the token that begins a text, if there is one.
      eos_id: of the token that ends a text, which training appends.
      pad_id: of the padding token.
      stop_ids: of the tokens that end a generation, ``eos_id`` among them.
      chat_template: Jinja source, if there is one.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None


def read_special_tokens(
    folder: Path, token_to_id: Callable[[str], int | None]
) -> SpecialTokens:
    """Reads the special tokens of a Hugging Face folder.

    Args:
      folder: a folder; each of the files may be missing.
      token_to_id: the tokenizer's own.

    Returns:
      The special tokens; one that isn't in the vocabulary counts as absent.

    Raises:
      ValueError: if a file is not a JSON object, or an id not a number.
    """
    config = _read_json(folder / TOKENIZER_CONFIG)
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        text = config.get(f"{name}_token")
        if isinstance(text, dict):  # an AddedToken as older files have it
            text = text.get("content")
        ids[name] = token_to_id(text) if isinstance(text, str) else None
    stops: list[int] = []
    for file in (GENERATION_CONFIG, MODEL_CONFIG):
        model = _read_json(folder / file)
        for name in ("bos", "eos", "pad"):
            stated = _as_ids(model.get(f"{name}_token_id"), folder / file)
            if ids[name] is None and stated:
                ids[name] = stated[0]
            if name == "eos" and not stops:
                stops = stated
    if ids["eos"] is not None:
        stops = [*stops, ids["eos"]]
    return SpecialTokens(
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        stop_ids=tuple(sorted(set(stops))),
        chat_template=_template(folder, config),
    )


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _as_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{file}: token ids must be integers from 0; got {value!r}.")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
