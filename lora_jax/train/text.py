"""Training examples for language models from JSONL: token ids, and which ones count.

An example is ``input_ids`` and ``loss_mask``, 1 where the token is a target that the
loss counts. The first token is never one: nothing comes before it to predict it from.
Where there is a prompt, the completion alone counts. Both are tokenised together and
the border is then found among the tokens, because tokenising them apart gives tokens
that the model never sees in one text; a token that reaches over the border counts.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.train.examples import read_jsonl

IGNORED = -100  # a label that doesn't count, as Hugging Face writes it
MESSAGES = "messages"
KINDS = {  # the keys that make a record one of a kind
    "input_ids": ("input_ids",),
    MESSAGES: ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}

Example = dict[str, np.ndarray]


class TextEncoder(Protocol):
    """What is asked of a tokenizer; `lora_jax.files.tokenizer.Tokenizer` has it."""

    @property
    def special(self) -> Any:
        """Has ``eos_id``, the token that ends a text, or None."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode_text(self, text: str) -> Any:
        """Gives ``ids`` and ``spans``, the characters that each token stands for."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        """Gives ``ids`` and ``mask``, 1 for what the assistant says."""
        ...


class TextData(NamedTuple):
    """The examples of a file.

    Attributes:
      examples: each with ``input_ids`` ``[t]`` int32 and ``loss_mask`` ``[t]`` uint8.
      truncated: how many were cut to ``max_length``, those that were dropped included.
      dropped: how many lost all their targets by that, and are not among ``examples``.
      targets: how many tokens of ``examples`` count.
      kind: of the lines, a key of `KINDS`.
    """

    examples: list[Example]
    truncated: int
    dropped: int
    targets: int
    kind: str


def read_text_examples(
    path: str | os.PathLike[str],
    tokenizer: TextEncoder | None,
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> TextData:
    """Reads a JSONL file for a causal language model, strictly.

    All lines are of one kind: ``{"text"}``, where all tokens count; ``{"prompt",
    "completion"}``; ``{"messages"}``, where the assistant's turns count; or
    ``{"input_ids"}`` with, if not all count, ``"loss_mask"`` (0 and 1) or ``"labels"``
    (the ids themselves, -100 where they don't count; not shifted). Other keys are left
    alone. Texts and completions end with the tokenizer's EOS, which counts.

    Args:
      path: the file.
      tokenizer: None for token ids without one.
      max_length: tokens an example may have; longer ones lose their end.
      vocab_size: ids must be below it; the tokenizer's if None.

    Returns:
      The examples, and what was cut.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file, line and reason for each bad line, up to 20; or if
        ``max_length`` leaves no target at all.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length must be at least 2, a token and its target; got {max_length}."
        )
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size if tokenizer else np.iinfo(np.int32).max
    kinds: set[str] = set()
    examples: list[Example] = []

    def check(record: dict[str, Any]) -> str:
        kind, fault = _kind(record, kinds)
        if fault:
            return fault
        try:
            ids, mask = _ENCODERS[kind](record, tokenizer)
        except (ValueError, TypeError) as error:
            return str(error)
        mask = [0, *mask[1:]]
        if not any(mask):
            return f"{kind} must give at least 1 target; got 0 of {len(ids)} tokens"
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            return (
                f"token ids must be in [0, {vocab_size}); got {min(ids)} to {max(ids)}"
            )
        examples.append(
            {
                "input_ids": np.asarray(ids, np.int32),
                "loss_mask": np.asarray(mask, np.uint8),
            }
        )
        return ""

    read_jsonl(path, fields={}, check=check)
    return _truncate(examples, max_length, str(path), kinds.pop())


def _truncate(
    examples: list[Example], max_length: int | None, path: str, kind: str
) -> TextData:
    longest = max(len(e["input_ids"]) for e in examples)
    limit = longest if max_length is None else max_length
    truncated = sum(len(e["input_ids"]) > limit for e in examples)
    cut = [{key: values[:limit] for key, values in e.items()} for e in examples]
    kept = [e for e in cut if e["loss_mask"].any()]
    if not kept:
        raise ValueError(
            f"{path}: max_length = {limit} must leave targets; it cuts off those of "
            f"all {len(cut)} examples, the longest of {longest} tokens. Raise it."
        )
    targets = sum(int(e["loss_mask"].sum()) for e in kept)
    return TextData(kept, truncated, len(cut) - len(kept), targets, kind)


def _kind(record: Mapping[str, Any], kinds: set[str]) -> tuple[str, str]:
    """Returns a record's kind, and what is wrong with it."""
    found = [kind for kind, keys in KINDS.items() if any(k in record for k in keys)]
    if len(found) != 1:
        return "", (
            f"must hold one of {', '.join(KINDS)}; its keys are {sorted(record)}"[:300]
        )
    kind = found[0]
    missing = [key for key in KINDS[kind] if key not in record]
    if missing:
        return kind, f"has no {missing[0]!r}; its keys are {sorted(record)}"[:300]
    if kinds and kind not in kinds:
        return kind, f"is {kind}, and the lines before are {next(iter(kinds))}"
    kinds.add(kind)
    return kind, ""


def _from_text(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> tuple[list[int], list[int]]:
    text = _string(record, "text")
    tokens = _needed(tokenizer).encode_text(text)
    return _end(tokens.ids, [1] * len(tokens.ids), tokenizer)


def _from_completion(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> tuple[list[int], list[int]]:
    completion = _string(record, "completion")
    prompt = _string(record, "prompt", may_be_empty=True)
    tokens = _needed(tokenizer).encode_text(prompt + completion)
    mask = [int(end > len(prompt)) for _, end in tokens.spans]
    return _end(tokens.ids, mask, tokenizer)


def _from_messages(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> tuple[list[int], list[int]]:
    tokens = _needed(tokenizer).encode_chat(record["messages"])
    return tokens.ids, tokens.mask


def _from_ids(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> tuple[list[int], list[int]]:
    ids = _integers(record, "input_ids")
    if "labels" in record and "loss_mask" in record:
        raise ValueError("must have 'labels' or 'loss_mask'; got both")
    key = "labels" if "labels" in record else "loss_mask"
    given = _integers(record, key) if key in record else [1] * len(ids)
    if len(given) != len(ids):
        raise ValueError(
            f"{key!r} must be as long as 'input_ids', {len(ids)}; got {len(given)}"
        )
    if key == "loss_mask":
        if not {*given} <= {0, 1}:
            raise ValueError(f"'loss_mask' must be 0 and 1; got {sorted({*given})[:8]}")
        return ids, given
    wrong = [i for i, y in enumerate(given) if y not in (IGNORED, ids[i])]
    if wrong:
        raise ValueError(
            f"'labels' must be the input_ids, not shifted, or {IGNORED}; got "
            f"{given[wrong[0]]} for {ids[wrong[0]]} at index {wrong[0]}"
        )
    return ids, [int(y != IGNORED) for y in given]


_ENCODERS = {
    "text": _from_text,
    "prompt and completion": _from_completion,
    MESSAGES: _from_messages,
    "input_ids": _from_ids,
}


def _end(
    ids: list[int], mask: list[int], tokenizer: TextEncoder | None
) -> tuple[list[int], list[int]]:
    """Appends EOS, unless the text wrote it."""
    eos = _needed(tokenizer).special.eos_id
    if eos is None:
        raise ValueError("a text must end with the tokenizer's EOS token; it has none")
    if ids and ids[-1] == eos:
        return ids, mask
    return [*ids, eos], [*mask, 1]


def _needed(tokenizer: TextEncoder | None) -> TextEncoder:
    if tokenizer is None:
        raise ValueError("must be input_ids, because the model has no tokenizer")
    return tokenizer


def _string(record: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} must be str; got {value!r}"[:200])
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{key!r} must not be empty")
    return value


def _integers(record: Mapping[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise TypeError(f"{key!r} must be a list of integers; got {value!r}"[:200])
    if not value:
        raise ValueError(f"{key!r} must not be empty")
    return value
