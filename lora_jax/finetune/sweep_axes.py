"""Reading a sweep's grid: the values of each setting, as texts in YAML."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.config_errors import PEFT_NAMES
from lora_jax.finetune.settings import SECTIONS

Grid = Mapping[str, Iterable[Any]] | Sequence[str]

SHORT = {"seed": "train.seed"}
MOST_RUNS = 2_000  # so that the record of a sweep stays small
KNOWN = [
    f"{section}.{field.name}"
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
]


def read_axes(grid: Grid, *, zipped: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the values of each setting, and what is wrong with the grid.

    Args:
      grid: see `lora_jax.finetune.sweep_grid.expand`.
      zipped: whether a value may be repeated.
    """
    faults: list[str] = []
    items: list[tuple[str, list[str]]] = []
    if isinstance(grid, Mapping):
        for key, values in grid.items():
            if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
                faults.append(f"{key}: its values must be a list; got {values!r}")
            else:
                items.append((key, [*map(_text, values)]))
    else:
        for word in [grid] if isinstance(grid, str) else grid:
            key, _, text = word.partition("=")
            found, wrong = _values(text)
            faults += [f"{key}: {fault}" for fault in wrong]
            if found or not wrong:
                items.append((key, found))
    axes: dict[str, list[str]] = {}
    for key, values in items:
        key = SHORT.get(key, key)
        if key not in KNOWN:
            faults.append(f"{key}: unknown setting. {_meant(key)}")
        elif key in axes:
            faults.append(f"{key}: given twice")
        elif not values:
            faults.append(f"{key}: no values, so there is no run")
        elif len(set(values)) < len(values) and not zipped:
            faults.append(f"{key}: the same value twice; got {', '.join(values)}")
        axes.setdefault(key, values)
    if not axes and not faults:
        faults.append("no setting is given, like train.learning_rate=1e-4,3e-4")
    return axes, faults


def _values(text: str) -> tuple[list[str], list[str]]:
    """Splits ``v1,v2`` and ``0..2``; also returns what is wrong with them."""
    found: list[str] = []
    faults: list[str] = []
    for value in _split(text) if text.strip() else ():
        ends = re.fullmatch(r"(-?\d{1,10})\.\.(-?\d{1,10})", value)
        if ends is None:
            if re.fullmatch(r"-?\d+\.\..*|.*\.\.-?\d+", value):
                faults.append(f"a range is FIRST..LAST, like 0..2; got {value}")
            elif not value:
                faults.append(f"a value is missing between commas; got {text}")
            found.append(value)
            continue
        first, last = map(int, ends.groups())
        if not 0 <= last - first < MOST_RUNS:
            faults.append(
                f"a range FIRST..LAST must have from 1 to {MOST_RUNS:,} values; got "
                f"{value}"
            )
        else:
            found += map(str, range(first, last + 1))
    return found, faults


def _split(text: str) -> list[str]:
    """Splits at the commas outside brackets and quotes."""
    pieces, depth = [""], 0
    for token in re.findall(r""""[^"]*"|'[^']*'|.""", text, re.DOTALL):
        depth += (token in "[{") - (token in "]}")
        if token == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


def _meant(key: str) -> str:
    """Returns a sentence with the setting that an unknown one may stand for."""
    section, _, name = key.rpartition(".")
    if section in ("", "lora") and name in PEFT_NAMES:
        return f"PEFT's {name} is lora.{PEFT_NAMES[name]} here."
    ends = {k.partition(".")[2]: k for k in reversed(KNOWN)}
    # Compared without the sections, which are long enough to make any two alike.
    own = {end: k for end, k in ends.items() if k == f"{section}.{end}"}
    if near := difflib.get_close_matches(name, own or ends, n=1):
        return f"Did you mean {ends[near[0]]!r}?"
    if own:
        return f"Known: {', '.join(own.values())}."
    near = difflib.get_close_matches(key, KNOWN, n=1)
    is_known = "Settings are section.key, like train.learning_rate."
    return f"Did you mean {near[0]!r}?" if near else is_known


def _text(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    return json.dumps(value, default=lambda other: other.tolist())  # NumPy's
