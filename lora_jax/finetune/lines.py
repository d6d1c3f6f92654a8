"""JSONL lines with text or token ids, for `encode` and `score`: validation, batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.finetune.errors import UserError
from lora_jax.train.buckets import length_buckets

MAX_FAULTS = 20

Batch = tuple[np.ndarray, tuple[np.ndarray, ...]]  # line indices, model inputs
Choose = Callable[[Sequence[int], int], PyTree]  # variables of lines, padded to rows


def is_ints(value: Any) -> bool:
    """Returns whether a value is a non-empty list of integers."""
    return isinstance(value, list) and {type(i) for i in value} == {int}


def text_fault(record: Mapping[str, Any]) -> str:
    """Returns an error message for a line of text or token ids; empty if valid."""
    if ("text" in record) == ("input_ids" in record):
        return f"must have 'text' or 'input_ids'; its keys are {sorted(record)}"[:200]
    if "text" in record and not isinstance(record["text"], str):
        return f"'text' must be a string; got {record['text']!r}"[:200]
    if "input_ids" in record and not is_ints(record["input_ids"]):
        ids = record["input_ids"]
        return f"'input_ids' must be a list of integers, at least 1; got {ids!r}"[:200]
    return ""


def check_faults(what: str, faults: Sequence[str]) -> None:
    """Raises a `UserError` headed ``what`` with the first 20 faults, if any."""
    if faults:
        shown, more = "\n  ".join(faults[:MAX_FAULTS]), len(faults) - MAX_FAULTS
        end = f"\n  and {more} more" if more > 0 else ""
        raise UserError(f"{what}:\n  {shown}{end}")


def check_ids(sequences: Sequence[list[int]], config: Any, path: str) -> None:
    """Raises unless token ids are within a model's vocabulary and context length.

    Args:
      sequences: the ids of each line.
      config: the model's config.
      path: file of the lines, for error messages.
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
    """Batches sequences by length, so that few shapes are compiled.

    Args:
      rows: rows per batch; the last one is padded with zeros.
      longest: the model's context length.
      *columns: sequences, of equal lengths across columns.

    Yields:
      The line indices of a batch, and for each column an array ``[rows, t]``, padded
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
