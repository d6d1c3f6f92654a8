"""Training examples for language models from JSONL: token ids and loss masks.

An example is ``input_ids`` and ``loss_mask``, which is 1 for target tokens, those that
count in the loss. The first token never is: nothing precedes it to predict it from. If
there is a prompt, only the completion counts. The two are tokenised together and split
afterwards, because tokenising them separately gives tokens that the model never sees in
one text; a token that spans the boundary counts.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.train.examples import (
    check_keys,
    integers_of,
    read_jsonl,
    string_of,
)

IGNORED = -100  # Hugging Face's label for tokens that don't count
MESSAGES = "messages"
KINDS = {  # the keys that define each kind of record
    "input_ids": ("input_ids",),
    MESSAGES: ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"input_ids": ("loss_mask", "labels"), MESSAGES: ("tools",)}

Record = Mapping[str, Any]
Example = dict[str, np.ndarray]


class TextEncoder(Protocol):
    """Interface of a tokenizer, such as `lora_jax.files.tokenizer.Tokenizer`."""

    @property
    def special(self) -> Any:
        """Has ``eos_id``, the token that ends a text (or None), and ``stop_ids``."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode_text(self, text: str) -> Any:
        """Returns ``ids`` and ``spans``, each token's range of characters."""
        ...

    def encode_chat(
        self, messages: Sequence[Record], *, tools: Sequence[Any] | None = None
    ) -> Any:
        """Returns ``ids``, ``mask`` and ``ends`` for each text needed for a chat.

        The mask is 1 for the assistant's text; ``ends`` are the ends of its turns.
        """
        ...


class Encoded(NamedTuple):
    """The tokens of a line; a chat may have several.

    Attributes:
      ids: the tokens.
      mask: 1 for targets.
      ends: in a chat, the last token of each assistant turn.
    """

    ids: list[int]
    mask: list[int]
    ends: Sequence[int] = ()


class TextData(NamedTuple):
    """The examples of a file.

    Attributes:
      examples: each with ``input_ids`` ``[t]`` int32 and ``loss_mask`` ``[t]`` uint8.
      lines: each example's line, counted from 0. A chat gives several examples if its
        template renders earlier turns differently once later ones follow.
      truncated: number cut to ``max_length``, including those dropped.
      dropped: number that lost all their targets in this way; not among ``examples``.
      targets: number of target tokens in ``examples``.
      kind: the lines' kind, a key of `KINDS`.
      ends: how often each token ends an assistant turn.
    """

    examples: list[Example]
    lines: list[int]
    truncated: int
    dropped: int
    targets: int
    kind: str
    ends: Mapping[int, int]


def read_text_examples(
    path: str | os.PathLike[str],
    tokenizer: TextEncoder | None,
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
    ignored: Sequence[str] = (),
) -> TextData:
    """Reads a JSONL file for a causal language model, strictly.

    All lines are of one kind: ``{"text"}``, where all tokens count; ``{"prompt",
    "completion"}``; ``{"messages"}``, optionally with ``"tools"``, where the
    assistant's turns count, except those with a ``"weight"`` of 0; or ``{"input_ids"}``
    with, if not all count, ``"loss_mask"`` (0 and 1) or ``"labels"`` (the ids, not
    shifted, or -100 where they don't count). Any other key is an error. Texts and
    completions end with the tokenizer's EOS, which counts.

    Args:
      path: the file.
      tokenizer: may be None for token ids.
      max_length: maximum tokens per example; longer ones are cut at the end.
      vocab_size: ids must be below it; the tokenizer's if None.
      ignored: keys that any line may have besides.

    Returns:
      The examples, and how many were cut.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: listing file, line and reason for each bad line, up to 20; or if
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
    lines: list[int] = []
    ends: Counter[int] = Counter()

    def check(record: dict[str, Any]) -> None:
        record = {key: record[key] for key in record if key not in ignored}
        kind = kind_of(record)
        if kinds and kind not in kinds:
            before = next(iter(kinds))
            raise ValueError(f"is {kind}, but the lines before are {before}")
        kinds.add(kind)
        found = encode_record(record, tokenizer, vocab_size=vocab_size)
        number = lines[-1] + 1 if lines else 0
        for ids, mask, each in found:
            lines.append(number)
            ends.update(each)
            examples.append(
                {
                    "input_ids": np.asarray(ids, np.int32),
                    "loss_mask": np.asarray(mask, np.uint8),
                }
            )

    read_jsonl(path, fields={}, check=check)
    limit = max(len(e["input_ids"]) for e in examples)
    longest, limit = limit, limit if max_length is None else max_length
    truncated = sum(len(e["input_ids"]) > limit for e in examples)
    cut = [{key: values[:limit] for key, values in e.items()} for e in examples]
    kept = [i for i, e in enumerate(cut) if e["loss_mask"].any()]
    if not kept:
        raise ValueError(
            f"{path}: max_length = {limit} must leave targets; it cuts off all of them "
            f"in {len(cut)} examples of up to {longest} tokens. Raise it."
        )
    return TextData(
        examples=[cut[i] for i in kept],
        lines=[lines[i] for i in kept],
        truncated=truncated,
        dropped=len(cut) - len(kept),
        targets=sum(int(cut[i]["loss_mask"].sum()) for i in kept),
        kind=kinds.pop(),
        ends=ends,
    )


def encode_record(
    record: Record, tokenizer: TextEncoder | None, *, vocab_size: int
) -> list[Encoded]:
    """Encodes a line as one or more examples; see `read_text_examples`.

    Raises:
      ValueError: if it has no kind, an unknown key, or no target.
      TypeError: if a value has the wrong type.
    """
    kind = kind_of(record)
    found = _ENCODERS[kind](record, tokenizer)
    found = [each._replace(mask=[0, *each.mask[1:]]) for each in found]
    kept = [each for each in found if any(each.mask)]
    if not kept:
        count = sum(len(each.ids) for each in found)
        raise ValueError(f"{kind} must give at least 1 target; got 0 of {count} tokens")
    low, high = min(min(e.ids) for e in kept), max(max(e.ids) for e in kept)
    if not 0 <= low <= high < vocab_size:
        raise ValueError(f"token ids must be in [0, {vocab_size}); got {low} to {high}")
    return kept


def kind_of(record: Record) -> str:
    """Returns a line's kind, a key of `KINDS`.

    Raises:
      ValueError: unless it has all keys of exactly one kind, and no unknown keys.
    """
    keys = sorted(record)
    found = [kind for kind, own in KINDS.items() if any(k in record for k in own)]
    if len(found) != 1:
        raise ValueError(
            f"must hold one of {', '.join(KINDS)}; its keys are {keys}"[:300]
        )
    kind = found[0]
    check_keys(record, KINDS[kind], OPTIONAL.get(kind, ()))
    return kind


def _from_text(record: Record, tokenizer: TextEncoder | None) -> list[Encoded]:
    text = string_of(record, "text")
    tokens = _needed(tokenizer).encode_text(text)
    return _end(tokens.ids, [1] * len(tokens.ids), tokenizer)


def _from_completion(record: Record, tokenizer: TextEncoder | None) -> list[Encoded]:
    completion = string_of(record, "completion")
    prompt = string_of(record, "prompt", may_be_empty=True)
    tokens = _needed(tokenizer).encode_text(prompt + completion)
    mask = [int(end > len(prompt)) for _, end in tokens.spans]
    return _end(tokens.ids, mask, tokenizer)


def _from_messages(record: Record, tokenizer: TextEncoder | None) -> list[Encoded]:
    encode = _needed(tokenizer).encode_chat
    chats = encode(record["messages"], tools=record.get("tools"))
    return [Encoded(chat.ids, chat.mask, chat.ends) for chat in chats]


def _from_ids(record: Record, tokenizer: TextEncoder | None) -> list[Encoded]:
    ids = integers_of(record, "input_ids")
    if not ids:
        raise ValueError("'input_ids' must not be empty")
    if "labels" in record and "loss_mask" in record:
        raise ValueError("must have 'labels' or 'loss_mask'; got both")
    key = "labels" if "labels" in record else "loss_mask"
    given = integers_of(record, key) if key in record else [1] * len(ids)
    if len(given) != len(ids):
        raise ValueError(
            f"{key!r} must be as long as 'input_ids', {len(ids)}; got {len(given)}"
        )
    if key == "loss_mask":
        if not {*given} <= {0, 1}:
            raise ValueError(f"'loss_mask' must be 0 and 1; got {sorted({*given})[:8]}")
        return [Encoded(ids, given)]
    wrong = [i for i, y in enumerate(given) if y not in (IGNORED, ids[i])]
    if wrong:
        raise ValueError(
            f"'labels' must be the input_ids, not shifted, or {IGNORED}; got "
            f"{given[wrong[0]]} for {ids[wrong[0]]} at index {wrong[0]}"
        )
    return [Encoded(ids, [int(y != IGNORED) for y in given])]


_ENCODERS = {
    "text": _from_text,
    "prompt and completion": _from_completion,
    MESSAGES: _from_messages,
    "input_ids": _from_ids,
}


def _end(
    ids: list[int], mask: list[int], tokenizer: TextEncoder | None
) -> list[Encoded]:
    whole = with_end(ids, _needed(tokenizer), "a text")
    return [Encoded(whole, mask + [1] * (len(whole) - len(ids)))]


def with_end(ids: list[int], tokenizer: TextEncoder, what: str) -> list[int]:
    """Returns a text's tokens with EOS, which it may already end with."""
    eos = tokenizer.special.eos_id
    if eos is None:
        raise ValueError(f"{what} must end with the tokenizer's EOS token; it has none")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _needed(tokenizer: TextEncoder | None) -> TextEncoder:
    if tokenizer is None:
        raise ValueError("must be input_ids, as the model has no tokenizer")
    return tokenizer
