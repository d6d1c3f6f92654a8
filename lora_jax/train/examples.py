"""Reads examples from JSONL files strictly: lists every bad line before training."""

import codecs
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_FAULTS = 20
MAX_LINE = 1 << 24  # bytes
MAX_CLASSES = 100_000
JSONL = (
    '\nEach line must be one JSON object, in UTF-8, such as {"text": "..."}: convert '
    "CSV, a JSON array or other formats to that."
)


class KeyTwiceError(ValueError):
    """A JSON object has a key twice."""


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    fields: Mapping[str, tuple[type, ...]] | None = None,
    check: Callable[[dict[str, Any]], str | None] | None = None,
) -> list[dict[str, Any]]:
    """Reads a JSONL file, strictly.

    Args:
      path: a UTF-8 file with one JSON object per line; blank lines, and a byte order
        mark at its start, are skipped.
      fields: the keys each object must have and the types of their values;
        ``{"text": (str,), "label": (str, int)}`` if None. Strings must not be blank;
        booleans don't count as integers.
      check: returns what else is wrong with an object, or raises it.

    Returns:
      The objects, including other keys.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: listing file, line and reason for each bad line, up to 20; or if the
        file is empty.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"data file {path} must exist; {found}.")
    fields = {"text": (str,), "label": (str, int)} if fields is None else fields
    records, faults, bad = [], [], 0
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record, fault = _parse(line)
        fault = fault or _record_fault(record, fields)
        try:
            fault = fault or (check and check(record))
        except (ValueError, TypeError) as error:
            fault = str(error)
        records.append(record)
        if fault:
            bad += 1
            faults += [f"{path}:{number}: {fault}"][: MAX_FAULTS - len(faults)]
    if faults:
        shown = "\n  ".join(faults)
        more = bad - len(faults)
        raise ValueError(
            f"{path} has {bad} bad line{'s' * (bad != 1)}:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + ("" if any(isinstance(record, dict) for record in records) else JSONL)
        )
    if not records:
        raise ValueError(f"{path} must hold at least 1 example; it has 0 lines.")
    return records


def label_vocabulary(labels: Sequence[str | int]) -> list[str | int]:
    """Returns the distinct labels in order; a label's class is its index.

    Args:
      labels: labels of the training data, all strings or all integers.

    Returns:
      Sorted labels; for integers every class from 0 to the largest, seen or not.

    Raises:
      ValueError: if there are fewer than 2 classes, or a number is negative or huge.
      TypeError: if strings and integers are mixed, or there are other types.

    Example:
      >>> label_vocabulary(["pos", "neg", "pos"]), label_vocabulary([2, 0])
      (['neg', 'pos'], [0, 1, 2])
    """
    kinds = {type(label) for label in labels}
    if len(kinds) > 1 or not kinds <= {str, int}:
        raise TypeError(
            "labels must be all strings or all integers; got "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}."
        )
    known: list[str | int] = [*sorted({y for y in labels if isinstance(y, str)})]
    if numbers := {y for y in labels if isinstance(y, int)}:
        if min(numbers) < 0:
            raise ValueError(f"labels must be at least 0; got {min(numbers)}.")
        if max(numbers) >= MAX_CLASSES:
            raise ValueError(
                f"labels must be class numbers below {MAX_CLASSES:,}; got "
                f"{max(numbers):,}. Quote labels that are names or ids."
            )
        known = [*range(max(numbers) + 1)]
    if len(known) < 2:
        raise ValueError(
            f"labels must have at least 2 classes; got {len(known)}: {known}."
        )
    return known


def encode_labels(
    labels: Sequence[str | int],
    vocabulary: Sequence[str | int],
    *,
    source: str = "data",
) -> np.ndarray:
    """Returns the class number of each label, ``[n]`` int32.

    Args:
      labels: one per example.
      vocabulary: from `label_vocabulary`, for the training data.
      source: name of the data in errors.

    Raises:
      ValueError: listing up to 20 examples (counted from 1) whose label is not in the
        vocabulary.

    Example:
      >>> encode_labels(["pos", "neg"], ["neg", "pos"]).tolist()
      [1, 0]
    """
    index = {label: i for i, label in enumerate(vocabulary)}
    bad = [(i, y) for i, y in enumerate(labels, start=1) if y not in index]
    if bad:
        shown = ", ".join(f"{y!r} (example {i})" for i, y in bad[:MAX_FAULTS])
        raise ValueError(
            f"labels of {source} must be among the {len(index)} classes "
            f"{list(vocabulary)[:MAX_FAULTS]}; got {len(bad)} that are not: {shown}."
        )
    return np.array([index[label] for label in labels], np.int32)


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns a suggestion for an unknown name: the closest known one, or all of them.

    Example:
      >>> nearest("usr", ("system", "user")), nearest("x", ("system", "user"))
      ("did you mean 'user'?", 'known: system, user')
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def check_keys(
    record: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raises a `ValueError` unless a line has the needed keys, and no unknown ones."""
    keys, known = sorted(record), (*needed, *optional)
    for key in needed:
        if key not in record:
            raise ValueError(f"has no {key!r}; its keys are {keys}"[:300])
    for key in keys:
        if key not in known:
            hint = nearest(key, known)
            raise ValueError(f"has an unknown key, {key[:40]!r}; {hint}")


def string_of(
    record: Mapping[str, Any], key: str, *, may_be_empty: bool = False
) -> str:
    """Returns a text of a line, or raises."""
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} must be str; got {value!r}"[:200])
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{key!r} must not be empty")
    return value


def integers_of(record: Mapping[str, Any], key: str) -> list[int]:
    """Returns the integers of a line, or raises."""
    value = record[key]
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise TypeError(f"{key!r} must be a list of integers; got {value!r}"[:200])
    return [*value]


def _parse(line: bytes) -> tuple[Any, str]:
    """Returns a line's value, and what is wrong with it."""
    if len(line) > MAX_LINE:
        return None, f"has {len(line):,} bytes; at most {MAX_LINE:,} are allowed"
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
        if rb"\u" in line:  # the only way to write a lone surrogate
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start}"
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        return None, f"not Unicode: it contains a lone surrogate, {half}"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at {error.colno}"
    except KeyTwiceError as error:
        return {}, str(error)
    except (ValueError, RecursionError) as error:  # endless digits, endless [[[
        return None, f"not JSON: {error}"
    return record, ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, or raises if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in found if keys.count(key) > 1)
        raise KeyTwiceError(f"has the key {key[:40]!r} twice")
    return found


def _record_fault(record: Any, fields: Mapping[str, tuple[type, ...]]) -> str:
    if not isinstance(record, dict):
        return f"must be an object {{...}}; got {type(record).__name__}"
    for name, types in fields.items():
        if name not in record:
            return f"has no {name!r}; its keys are {sorted(record)}"[:300]
        value = record[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join(t.__name__ for t in types)
            return f"{name!r} must be {wanted}; got {value!r}"[:200]
        if isinstance(value, str) and not value.strip():
            return f"{name!r} must not be empty"
    return ""
