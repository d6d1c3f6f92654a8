"""Data files whose lines name their adapter: `OWNER` is the field.

A run on such files trains one adapter for each name, on batches that mix them.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import listed
from lora_jax.finetune.job import data_files
from lora_jax.finetune.sections import DataSettings
from lora_jax.names import OWNER
from lora_jax.train.examples import MAX_FAULTS, MAX_LINE, nearest, read_jsonl

NAME = re.compile(r"\w[\w.-]{0,99}")  # it names a folder


class LineAdapters(NamedTuple):
    """The adapters of the lines of a run's files.

    Attributes:
      names: the adapters, sorted; an adapter's number is its index.
      lines: the number of each line's adapter, by split.
    """

    names: tuple[str, ...]
    lines: Mapping[str, list[int]]


def names_adapters(data: DataSettings) -> bool:
    """Returns whether a line of a run's files has the field `OWNER`."""
    paths = (Path(p) for p in (data.train, data.validation, data.test) if p)
    return any(_has_field(path) for path in paths if path.is_file())


def line_adapters(
    data: DataSettings, splits: Sequence[str], known: Sequence[str] = ()
) -> LineAdapters:
    """Reads which adapter each line of a run's files is for; see `read_adapters`.

    Args:
      data: the settings.
      splits: the splits that are read.
      known: the adapters, if they are known.

    Returns:
      The adapters and their lines; without lines if none of them names its adapter.
    """
    if not names_adapters(data):
        return LineAdapters(tuple(known), {})
    files = data_files(data, splits)
    if known:
        return read_adapters(files, known)
    return read_adapters({"train": data.train, **files})


def read_adapters(
    files: Mapping[str, str], known: Sequence[str] | None = None
) -> LineAdapters:
    """Reads which adapter each line of some files is for.

    Args:
      files: the file of each split, ``train`` among them unless ``known`` is given.
      known: the adapters, if they are known.

    Returns:
      The adapters and their lines.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: listing every line without a valid name; every name of another split
        that isn't in ``train``; every adapter that has no line in ``validation``.
    """
    found: dict[str, list[str]] = {}
    names = None if known is None else sorted(known)
    order = sorted(files, key=lambda split: split != "train")
    for split in order:
        wanted = names

        def check(record: dict[str, Any], wanted: list[str] | None = wanted) -> str:
            name = record[OWNER]
            if not NAME.fullmatch(name):
                return (
                    f"{OWNER!r} names a folder: up to 100 letters, digits, '_', '-' "
                    f"and '.', the first not '-' or '.'; got {name!r}"[:220]
                )
            if wanted is not None and name not in wanted:
                few = wanted if len(wanted) <= MAX_FAULTS else [*wanted[:5], "..."]
                return f"{OWNER!r} must be one that is trained; got {name!r}; " + (
                    nearest(name, few)
                )
            return ""

        rows = read_jsonl(files[split], fields={OWNER: (str,)}, check=check)
        found[split] = [row[OWNER] for row in rows]
        if names is None:
            names = sorted(set(found[split]))
            _check_distinct(names)
    assert names is not None
    for split in {"validation"} & found.keys() if known is None else ():
        if missing := sorted(set(names) - set(found[split])):
            raise UserError(
                f"every adapter needs examples in data.{split}, to choose its best "
                f"step; {files[split]} has none for {listed(missing)}."
            )
    index = {name: number for number, name in enumerate(names)}
    lines = {split: [index[name] for name in own] for split, own in found.items()}
    return LineAdapters(tuple(names), lines)


def _check_distinct(names: Sequence[str]) -> None:
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    if same := [own for own in folded.values() if len(own) > 1]:
        shown = listed([" and ".join(own) for own in same])
        raise UserError(
            f"names of adapters must differ in more than case, as they name folders; "
            f"got {shown}."
        )


def _has_field(path: Path) -> bool:
    """Returns whether a line of a file has the field, however bad others are."""
    field = f'"{OWNER}"'.encode()
    with path.open("rb") as file:
        for line in file:
            if field in line and len(line) <= MAX_LINE:
                # The reader reports what is wrong with the line.
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and OWNER in record:
                        return True
    return False
