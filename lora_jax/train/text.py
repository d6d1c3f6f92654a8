"""Training examples for language models from JSONL: token ids, and which ones count.

An example is ``input_ids`` and ``loss_mask``, 1 where the token is a target that the
loss counts. The first token is never one: nothing comes before it to predict it from.
Where there is a prompt, the completion alone counts. Both are tokenised together and
the border is then found among the tokens, because tokenising them apart gives tokens
that the model never sees in one text; a token that reaches over the border counts.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.train.examples import nearest, read_jsonl

IGNORED = -100  # a label that doesn't count, as Hugging Face writes it
MESSAGES = "messages"
KINDS = {  # the keys that make a record one of a kind
    "input_ids": ("input_ids",),
    MESSAGES: ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"input_ids": ("loss_mask", "labels"), MESSAGES: ("tools",)}

Record = Mapping[str, Any]
Example = dict[str, np.ndarray]


class TextEncoder(Protocol):
    """What is asked of a tokenizer; `lora_jax.files.tokenizer.Tokenizer` has it."""

    @property
    def special(self) -> Any:
        """Has ``eos_id``, the token that ends a text, or None, and ``stop_ids``."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode_text(self, text: str) -> Any:
        """Gives ``ids`` and ``spans``, the characters that each token stands for."""
        ...

    def encode_chat(
        self, messages: Sequence[Record], *, tools: Sequence[Any] | None = None
    ) -> Any:
        """Gives ``ids``, ``mask`` and ``ends`` of each text that a chat takes.

        The mask is 1 for what the assistant says; its turns have ends.
        """
        ...


class Encoded(NamedTuple):
    """A line's tokens; a chat may have several.

    Attributes:
      ids: the tokens.
      mask: 1 where a token counts.
      ends: the last token of each turn of the assistant's, in a chat.
    """

    ids: list[int]
    mask: list[int]
    ends: Sequence[int] = ()


class TextData(NamedTuple):
    """The examples of a file.

    Attributes:
      examples: each with ``input_ids`` ``[t]`` int32 and ``loss_mask`` ``[t]`` uint8.
      lines: from which line each is, counted from 0. A chat gives several examples
        where its template writes earlier turns otherwise once later ones follow.
      truncated: how many were cut to ``max_length``, those that were dropped included.
      dropped: how many lost all their targets by that, and are not among ``examples``.
      targets: how many tokens of ``examples`` count.
      kind: of the lines, a key of `KINDS`.
      ends: how often each token ends a turn of the assistant's.
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
) -> TextData:
    """Reads a JSONL file for a causal language model, strictly.

    All lines are of one kind: ``{"text"}``, where all tokens count; ``{"prompt",
    "completion"}``; ``{"messages"}``, with ``"tools"`` if there are any, where the
    assistant's turns count, but for those with a ``"weight"`` of 0; or
    ``{"input_ids"}`` with, if not all count, ``"loss_mask"`` (0 and 1) or ``"labels"``
    (the ids themselves, -100 where they don't count; not shifted). Any other key is an
    error. Texts and completions end with the tokenizer's EOS, which counts.

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
    lines: list[int] = []
    ends: Counter[int] = Counter()

    def check(record: dict[str, Any]) -> str:
        try:
            kind = kind_of(record)
            if kinds and kind not in kinds:
                before = next(iter(kinds))
                raise ValueError(f"is {kind}, and the lines before are {before}")
            kinds.add(kind)
            found = encode_record(record, tokenizer, vocab_size=vocab_size)
        except (ValueError, TypeError) as error:
            return str(error)
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
        return ""

    read_jsonl(path, fields={}, check=check)
    limit = max(len(e["input_ids"]) for e in examples)
    longest, limit = limit, limit if max_length is None else max_length
    truncated = sum(len(e["input_ids"]) > limit for e in examples)
    cut = [{key: values[:limit] for key, values in e.items()} for e in examples]
    kept = [i for i, e in enumerate(cut) if e["loss_mask"].any()]
    if not kept:
        raise ValueError(
            f"{path}: max_length = {limit} must leave targets; it cuts off those of "
            f"all {len(cut)} examples, the longest of {longest} tokens. Raise it."
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
    """Encodes a line; see `read_text_examples`.

    Args:
      record: the line.
      tokenizer: None for token ids without one.
      vocab_size: ids must be below it.

    Returns:
      The examples it gives, at least one.

    Raises:
      ValueError: if it is of no kind, has a key that nothing reads, or no target.
      TypeError: if a value is of the wrong type.
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
    """Returns a line's kind.

    Args:
      record: the line.

    Returns:
      A key of `KINDS`.

    Raises:
      ValueError: if it has not all keys of just one kind, or others besides.
    """
    keys = sorted(record)
    found = [kind for kind, own in KINDS.items() if any(k in record for k in own)]
    if len(found) != 1:
        raise ValueError(
            f"must hold one of {', '.join(KINDS)}; its keys are {keys}"[:300]
        )
    kind = found[0]
    for key in KINDS[kind]:
        if key not in record:
            raise ValueError(f"has no {key!r}; its keys are {keys}"[:300])
    known = (*KINDS[kind], *OPTIONAL.get(kind, ()))
    for key in keys:
        if key not in known:
            hint = nearest(key, known)
            raise ValueError(f"has a key that nothing reads, {key[:40]!r}; {hint}")
    return kind


def _from_text(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> list[Encoded]:
    text = _string(record, "text")
    tokens = _needed(tokenizer).encode_text(text)
    return _end(tokens.ids, [1] * len(tokens.ids), tokenizer)


def _from_completion(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> list[Encoded]:
    completion = _string(record, "completion")
    prompt = _string(record, "prompt", may_be_empty=True)
    tokens = _needed(tokenizer).encode_text(prompt + completion)
    mask = [int(end > len(prompt)) for _, end in tokens.spans]
    return _end(tokens.ids, mask, tokenizer)


def _from_messages(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> list[Encoded]:
    chats = _needed(tokenizer).encode_chat(
        record["messages"], tools=record.get("tools")
    )
    return [Encoded(chat.ids, chat.mask, chat.ends) for chat in chats]


def _from_ids(
    record: Mapping[str, Any], tokenizer: TextEncoder | None
) -> list[Encoded]:
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
    """Appends EOS, unless the text wrote it."""
    eos = _needed(tokenizer).special.eos_id
    if eos is None:
        raise ValueError("a text must end with the tokenizer's EOS token; it has none")
    if ids and ids[-1] == eos:
        return [Encoded(ids, mask)]
    return [Encoded([*ids, eos], [*mask, 1])]


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
