"""The tokenizer that a GGUF file carries in its metadata.

Byte-level BPE (``tokenizer.ggml.model`` "gpt2") is rebuilt from tokens and merges. The
file names the rule that splits text before any merge and leaves the rule itself to
llama.cpp's code; the rules known here are those of the models' own ``tokenizer.json``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.io.special import Special

CONTROL, USER_DEFINED = 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {  # a regular expression; None for GPT-2's own
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": None,
}
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")
_KEYS = {"tokens": list, "merges": list, "token_type": np.ndarray}


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> tuple[Any, Special]:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      path: of the file, for errors.
      metadata: of its header.

    Returns:
      A ``tokenizers.Tokenizer``, and what is special among its tokens.

    Raises:
      ValueError: if its kind or its rule to split text is not known here, or its parts
        do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"{path} must have a byte-level BPE tokenizer ('gpt2'); its kind is "
            f"{kind!r}. Give token ids, or take the model's Hugging Face folder, whose "
            "tokenizer.json says what a GGUF file leaves out."
        )
    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in _SPLITS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre must be one of {sorted(_SPLITS)}; got "
            f"{rule!r}. Give token ids, or take the model's Hugging Face folder."
        )
    parts: dict[str, Any] = {
        key: metadata.get(f"tokenizer.ggml.{key}") for key in _KEYS
    }
    faults = [
        f"tokenizer.ggml.{key} must be a list, got {type(parts[key]).__name__}"
        for key, expected in _KEYS.items()
        if not isinstance(parts[key], expected)
    ]
    if not faults:
        faults = _faults(**parts)
    if faults:
        raise ValueError(
            f"{path} must hold a whole tokenizer; {len(faults)} faults: "
            f"{'; '.join(faults[:8])}."
        )
    tokenizer = _byte_level(rule, **parts)
    special = _special(path, metadata)
    if metadata.get("tokenizer.ggml.add_bos_token", rule in _LLAMA3_NAMES):
        _begin_with(tokenizer, special.bos_id)
    return tokenizer, special


def _faults(tokens: list[Any], merges: list[Any], token_type: np.ndarray) -> list[str]:
    faults = []
    if len(token_type) != len(tokens):
        faults.append(f"{len(tokens)} tokens and {len(token_type)} token types")
    known = set(tokens)
    if not all(isinstance(token, str) for token in known):
        return [*faults, "tokens must be strings"]
    if len(known) != len(tokens):
        faults.append(f"{len(tokens) - len(known)} tokens are there twice")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else []
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            faults.append(f"merge {str(merge)[:40]!r} must join two tokens to a third")
    return faults


def _byte_level(
    rule: str, tokens: list[str], merges: list[str], token_type: np.ndarray
) -> Any:
    from tokenizers import (
        AddedToken,
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
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, token_type.tolist(), strict=True)
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def _begin_with(tokenizer: Any, bos_id: int | None) -> None:
    """Makes every text begin with the token."""
    from tokenizers import processors

    if bos_id is not None:
        bos = tokenizer.id_to_token(bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [bos_id], "tokens": [bos]}],
        )


def _special(path: Path, metadata: Mapping[str, Any]) -> Special:
    tokens = metadata["tokenizer.ggml.tokens"]

    def identity(name: str) -> int | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < len(tokens)):
            raise ValueError(
                f"{path}: tokenizer.ggml.{name}_token_id must be a token in [0, "
                f"{len(tokens)}); got {token!r}."
            )
        return token

    eos, bos = identity("eos"), identity("bos")
    template = metadata.get("tokenizer.chat_template")
    ends = (eos, identity("eot"), identity("eom"))
    return Special(
        bos_id=bos,
        eos_id=eos,
        pad_id=identity("padding"),
        stop_ids=tuple(sorted({token for token in ends if token is not None})),
        chat_template=template if isinstance(template, str) else None,
    )
