"""Lines of text or token ids, for `encode` and `score`: their faults, and batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.finetune.errors import UserError
from lora_jax.train.buckets import length_buckets

MAX_FAULTS = 20

Batch = tuple[np.ndarray, tuple[np.ndarray, ...]]  # which lines, and the model's inputs


def is_ints(value: Any) -> bool:
    """Whether a value is a list of integers, at least one."""
    return (
        isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
    )


def text_fault(record: Mapping[str, Any]) -> str:
    """Says what is wrong with a line of text or token ids; empty if nothing is."""
    if ("text" in record) == ("input_ids" in record):
        return f"must have 'text' or 'input_ids'; its keys are {sorted(record)}"[:200]
    if "text" in record and not isinstance(record["text"], str):
        return f"'text' must be a string; got {record['text']!r}"[:200]
    if "input_ids" in record and not is_ints(record["input_ids"]):
        ids = record["input_ids"]
        return f"'input_ids' must be a list of integers, at least 1; got {ids!r}"[:200]
    return ""


def check_faults(what: str, faults: Sequence[str]) -> None:
    """Raises if there are faults.

    Args:
      what: they are.
      faults: a line each; the first 20 are shown.

    Raises:
      UserError: with all that are shown.
    """
    if faults:
        shown, more = "\n  ".join(faults[:MAX_FAULTS]), len(faults) - MAX_FAULTS
        end = f"\n  and {more} more" if more > 0 else ""
        raise UserError(f"{what}:\n  {shown}{end}")


def check_ids(sequences: Sequence[list[int]], config: Any, path: str) -> None:
    """Raises unless token ids are those of a model, and not too many.

    Args:
      sequences: the ids of each line.
      config: the model's.
      path: of the lines, for errors.

    Raises:
      UserError: naming each line.
    """
    faults, longest = [], config.max_positions
    for number, ids in enumerate(sequences, start=1):
        if not 1 <= len(ids) <= longest:
            faults.append(
                f"{path}: example {number}: must have 1 to {longest} tokens, the "
                f"model's context; got {len(ids)}"
            )
        elif not 0 <= min(ids) <= max(ids) < config.vocab_size:
            faults.append(
                f"{path}: example {number}: ids must be in [0, {config.vocab_size}); "
                f"got {min(ids)} to {max(ids)}"
            )
    check_faults("bad token ids", faults)


def by_length(
    rows: int, longest: int, *columns: Sequence[Sequence[int]]
) -> Iterator[Batch]:
    """Batches sequences of similar lengths, so that few shapes are compiled.

    Args:
      rows: of a batch; the last one is filled with zeros.
      longest: what the model takes.
      *columns: sequences, those of a line of one length in all columns.

    Yields:
      The numbers of a batch's lines, and of each column an array ``[rows, t]``, padded
      with zeros; the shortest sequences come first.
    """
    lengths = [len(row) for row in columns[0]]
    buckets = length_buckets(lengths, longest=longest)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        width = next(b for b in buckets if b >= lengths[members[-1]])
        arrays = tuple(np.zeros((rows, width), np.int32) for _ in columns)
        for array, column in zip(arrays, columns, strict=True):
            for row, member in enumerate(members):
                array[row, : lengths[member]] = column[member]
        yield members, arrays
