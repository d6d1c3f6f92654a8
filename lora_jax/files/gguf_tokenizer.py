"""The tokenizer in a GGUF file's metadata.

Byte-level BPE (``tokenizer.ggml.model`` "gpt2") is rebuilt from tokens and merges. The
file gives only the name of the pre-tokenizer, which is defined in llama.cpp's code; the
definitions here are those of the models' own ``tokenizer.json``.

SentencePiece's BPE ("llama": Llama 2, Mistral, Phi-3, Gemma) is rebuilt from tokens and
scores: pairs are merged in the order of the merged token's score.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.special_tokens import SpecialTokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
LONGEST_TOKEN = 1000  # characters; real ones have under 200
_SPACE = "\u2581"  # SentencePiece's space
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {  # a regular expression; None for GPT-2's
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": None,
}
_NAMED = {  # special tokens: the template variable, and GGUF's name
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
    "sep_token": "seperator",  # as the format spells it
    "cls_token": "cls",
    "mask_token": "mask",
}
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")
_KEYS = {
    BYTE_LEVEL: {"tokens": list, "merges": list, "token_type": np.ndarray},
    SENTENCEPIECE: {"tokens": list, "scores": np.ndarray, "token_type": np.ndarray},
}


def build_tokenizer(
    path: Path, metadata: Mapping[str, Any]
) -> tuple[Any, SpecialTokens]:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      path: the file, for error messages.
      metadata: its header's fields.

    Returns:
      A ``tokenizers.Tokenizer``, and its special tokens.

    Raises:
      ValueError: if its type or pre-tokenizer is not supported, or its parts are
        inconsistent.
    """
    kind: Any = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f"{path} must have a byte-level BPE tokenizer ({BYTE_LEVEL!r}) or "
            f"SentencePiece's BPE ({SENTENCEPIECE!r}); its type is {_short(kind)}. "
            "Use token ids, or the model's Hugging Face folder with its complete "
            "tokenizer.json."
        )
    rule: Any = metadata.get("tokenizer.ggml.pre")
    if kind == BYTE_LEVEL and not (isinstance(rule, str) and rule in _SPLITS):
        raise ValueError(
            f"{path}: tokenizer.ggml.pre must be one of {sorted(_SPLITS)}; got "
            f"{_short(rule)}. Use token ids, or the model's Hugging Face folder."
        )
    parts: dict[str, Any] = {
        key: metadata.get(f"tokenizer.ggml.{key}") for key in _KEYS[kind]
    }
    faults = [
        f"tokenizer.ggml.{key} must be a list, got {type(parts[key]).__name__}"
        for key, expected in _KEYS[kind].items()
        if not isinstance(parts[key], expected)
    ]
    if not faults:
        faults = _faults(**parts)
    if faults:
        raise ValueError(
            f"{path} must contain a complete tokenizer; {len(faults)} faults: "
            f"{'; '.join(faults[:8])}."
        )
    special = _special(path, metadata)
    if kind == BYTE_LEVEL:
        tokenizer = _byte_level(rule, **parts)
        begins = rule in _LLAMA3_NAMES
    else:
        prefix = _flag(path, metadata, "add_space_prefix", True)
        tokenizer = _sentencepiece(prefix, **parts)
        begins = True
    _add_tokens(tokenizer, parts["tokens"], parts["token_type"])
    if _flag(path, metadata, "add_bos_token", begins):
        _begin_with(tokenizer, special.bos_id)
    return tokenizer, special


def _flag(path: Path, metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if type(value) not in (bool, int):
        raise ValueError(
            f"{path}: tokenizer.ggml.{key} must be true or false; got {_short(value)}."
        )
    return bool(value)


def _short(value: Any) -> str:
    return repr(value)[:80]


def _faults(
    tokens: list[Any],
    token_type: np.ndarray,
    merges: Sequence[Any] = (),
    scores: np.ndarray | None = None,
) -> list[str]:
    faults = []
    if len(token_type) != len(tokens):
        faults.append(f"{len(tokens)} tokens and {len(token_type)} token types")
    known = set(tokens)
    if not all(isinstance(token, str) for token in known):
        return [*faults, "tokens must be strings"]
    if long := [token for token in known if len(token) > LONGEST_TOKEN]:
        faults.append(f"{len(long)} tokens have over {LONGEST_TOKEN} characters")
    if len(known) != len(tokens):
        faults.append(f"{len(tokens) - len(known)} tokens appear twice")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else []
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            faults.append(
                f"merge {str(merge)[:40]!r} must join two tokens into a third"
            )
    if scores is not None and scores.shape != (len(tokens),):
        faults.append(f"{len(tokens)} tokens and {scores.size} scores")
    elif scores is not None and not np.isfinite(scores).all():
        faults.append("scores must be finite")
    return faults


def _byte_level(
    rule: str, tokens: list[str], merges: list[str], token_type: np.ndarray
) -> Any:
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, pairs, ignore_merges=rule in _LLAMA3_NAMES)
    )
    split = _SPLITS[rule]
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps: list[Any] = [by_bytes]
    if split is not None:
        steps = [pre_tokenizers.Split(Regex(split), "isolated"), by_bytes]
    if rule == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), by_bytes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    prefix: bool, tokens: list[str], scores: np.ndarray, token_type: np.ndarray
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = [t for t, kind in zip(tokens, token_type, strict=True) if kind == UNKNOWN]
    model = models.BPE(
        vocabulary,
        _merges(tokens, scores, token_type),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool((token_type == BYTE).any()),
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps = [normalizers.Prepend(_SPACE), *steps]
        back = [*back, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(
    tokens: list[str], scores: np.ndarray, token_type: np.ndarray
) -> list[tuple[str, str]]:
    """Returns every pair of tokens that forms a token, highest score first."""
    kinds = zip(tokens, token_type.tolist(), strict=True)
    parts = {token for token, kind in kinds if kind == NORMAL}
    merges = []
    for i in np.argsort(-scores, kind="stable").tolist():
        whole = tokens[i]
        if whole in parts:
            cuts = ((whole[:at], whole[at:]) for at in range(1, len(whole)))
            merges += [pair for pair in cuts if pair[0] in parts and pair[1] in parts]
    return merges


def _add_tokens(tokenizer: Any, tokens: list[str], token_type: np.ndarray) -> None:
    """Adds the tokens that are matched before the text is split.

    Gemma's runs of spaces are such tokens; older files contain them as `_SPACE`.
    """
    from tokenizers import AddedToken

    added = [
        AddedToken(token, normalized=_SPACE in token, special=kind == CONTROL)
        for token, kind in zip(tokens, token_type.tolist(), strict=True)
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _begin_with(tokenizer: Any, bos_id: int | None) -> None:
    """Makes every text start with the token."""
    from tokenizers import processors

    if bos_id is not None:
        bos = tokenizer.id_to_token(bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [bos_id], "tokens": [bos]}],
        )


def _special(path: Path, metadata: Mapping[str, Any]) -> SpecialTokens:
    tokens = metadata["tokenizer.ggml.tokens"]

    def token_id(name: str) -> int | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < len(tokens)):
            raise ValueError(
                f"{path}: tokenizer.ggml.{name}_token_id must be a token in [0, "
                f"{len(tokens)}); got {token!r}."
            )
        return token

    eos, bos = token_id("eos"), token_id("bos")
    template = metadata.get("tokenizer.chat_template")
    ends = (eos, token_id("eot"), token_id("eom"))
    return SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        pad_id=token_id("padding"),
        stop_ids=tuple(sorted({token for token in ends if token is not None})),
        chat_template=template if isinstance(template, str) else None,
        template_file=path,
        texts={
            name: tokens[token]
            for name, key in _NAMED.items()
            if type(token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is int
            and 0 <= token < len(tokens)
        },
    )
