"""What commands write to, and files of lines, in and out."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.atomic import is_leftover, write_text
from lora_jax.finetune.errors import UserError
from lora_jax.train.buckets import length_buckets


def check_target(out: str, data: str) -> Path:
    """Returns the file to write; raises where it can't be written or is the data."""
    target = Path(out)
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}.")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; it must be a file.")
    if target.exists() and Path(data).exists() and target.samefile(data):
        raise UserError(f"--out {target} is the data file itself; name another file.")
    return target


def check_new_folder(target: Path) -> None:
    """Raises unless ``--out`` is absent or empty, but for what a kill has left."""
    is_free = target.is_dir() and all(is_leftover(p.name) for p in target.iterdir())
    if target.exists() and not is_free:
        raise UserError(f"--out {target} exists and is not empty; name a new folder.")


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines: all of them under the file's name, or none."""
    write_text(target, "".join(json.dumps(line) + "\n" for line in lines))


def by_length(
    lengths: Sequence[int], rows: int, longest: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Groups sequences of similar lengths, so that few shapes are compiled.

    Args:
      lengths: tokens of each sequence.
      rows: of a group, at most.
      longest: what the model takes.

    Yields:
      The numbers of a group's sequences, and the length to pad them to; the shortest
      sequences come first.
    """
    buckets = length_buckets(lengths, longest=longest)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        needed = max(lengths[i] for i in members)
        yield members, next(bucket for bucket in buckets if bucket >= needed)
