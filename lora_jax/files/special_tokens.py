"""The special tokens and chat template in a model folder.

They are in several files: the tokens' texts in ``tokenizer_config.json``, the ids that
end a generation in ``generation_config.json`` (or ``config.json``), the chat template
in ``chat_template.jinja`` or ``tokenizer_config.json``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_jax.files.json_file import read_json, read_text

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENS_MAP = "special_tokens_map.json"
MODEL_CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
MAX_ID = 1 << 31


class SpecialTokens(NamedTuple):
    """A tokenizer's special tokens.

    Attributes:
      bos_id: id of the beginning-of-text token.
      eos_id: id of the end-of-text token, which training appends.
      pad_id: id of the padding token.
      stop_ids: ids of the tokens that end a generation, including ``eos_id``.
      chat_template: Jinja source.
      template_file: the file with the template.
      texts: texts of all special tokens by template variable, such as ``"unk_token"``.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    template_file: Path | None = None
    texts: Mapping[str, Any] = MappingProxyType({})


def read_special_tokens(
    folder: Path, token_to_id: Callable[[str], int | None]
) -> SpecialTokens:
    """Reads the special tokens of a Hugging Face folder.

    Args:
      folder: the folder; any of the files may be missing.
      token_to_id: the tokenizer's method.

    Returns:
      The special tokens; those that are not in the vocabulary are None.

    Raises:
      ValueError: if a file is not a JSON object, or an id is invalid.
    """
    config = _read_json(folder / TOKENIZER_CONFIG)
    texts = _texts(_read_json(folder / TOKENS_MAP)) | _texts(config)
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        text = _texts(config).get(f"{name}_token")
        ids[name] = None if text is None else _find(token_to_id, text)
    stops: list[int] = []
    for file in (GENERATION_CONFIG, MODEL_CONFIG):
        model = _read_json(folder / file)
        if isinstance(text := model.get("text_config"), dict):  # of a multimodal model
            model = text | model
        for name in ("bos", "eos", "pad"):
            stated = _as_ids(model.get(f"{name}_token_id"), folder / file)
            if ids[name] is None and stated:
                ids[name] = stated[0]
            if name == "eos" and not stops:
                stops = stated
    if ids["eos"] is not None:
        stops = [*stops, ids["eos"]]
    template, file = _template(folder, config)
    return SpecialTokens(
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        stop_ids=tuple(sorted(set(stops))),
        chat_template=template,
        template_file=file,
        texts=texts,
    )


def _texts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the template variables of transformers: named tokens and the others."""
    named: dict[str, Any] = {
        key: _text(value) for key, value in config.items() if key.endswith("_token")
    }
    others = config.get("additional_special_tokens")
    if isinstance(others, list):
        named["additional_special_tokens"] = [_text(token) for token in others]
    return {key: text for key, text in named.items() if text is not None}


def _text(token: Any) -> str | None:
    """Returns a token's text; older files contain the fields of an AddedToken."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _find(token_to_id: Callable[[str], int | None], text: str) -> int | None:
    try:
        return token_to_id(text)
    except UnicodeError:  # a lone surrogate, not in any vocabulary
        return None


def _template(folder: Path, config: dict[str, Any]) -> tuple[str | None, Path | None]:
    """Returns the chat template and its file."""
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE), folder / TEMPLATE
    found = config.get("chat_template")
    if isinstance(found, list):  # several named ones
        entries = [t for t in reversed(found) if isinstance(t, dict)]
        default = (t.get("template") for t in entries if t.get("name") == "default")
        found = next(default, None)
    if isinstance(found, str):
        return found, folder / TOKENIZER_CONFIG
    return None, None


def _as_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not 0 <= i < MAX_ID for i in ids):
        got = repr(value)[:80]
        raise ValueError(
            f"{file}: token ids must be integers from 0 to {MAX_ID - 1}; got {got}."
        )
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
