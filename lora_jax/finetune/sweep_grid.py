"""The runs that a grid of settings describes, and which of them can share a step."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.settings import Config, RunSettings, load_settings
from lora_jax.finetune.sweep_axes import MOST_RUNS, Grid, read_axes
from lora_jax.tree.targets import Target

# What may differ between the members of one step.
OWN = {
    *(f"lora.{name}" for name in ("rank", "alpha", "rank_pattern", "alpha_pattern")),
    *("lora.rslora", "lora.dropout_rate", "lora.vera_seed", "output.dir"),
    *(f"train.{name}" for name in ("epochs", "max_steps", "learning_rate", "seed")),
    *(f"train.{name}" for name in ("lora_b_ratio", "schedule", "warmup", "clip_norm")),
    *(f"train.{name}" for name in ("weight_decay", "log_every", "eval_every", "keep")),
    *(f"train.{name}" for name in ("save_every", "patience", "samples", "baseline")),
}
# What all runs of a sweep must have alike, and why.
ALIKE = "runs are compared by their metrics on the same examples"
FIXED = {
    "output.dir": "it is the sweep's own folder",
    **dict.fromkeys(
        ("data.validation", "data.test", "data.holdout", "data.seed"), ALIKE
    ),
}
MOST_SHOWN = 10
MESH = "the runs of a sweep share the devices; set mesh.member for all of them"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      values: what the grid says of it, by setting.
      settings: of the run.
    """

    name: str
    values: dict[str, str]
    settings: RunSettings


def expand(config: Config, grid: Grid, *, zipped: bool = False) -> list[Point]:
    """Returns the runs of a grid.

    Args:
      config: of all runs, see `load_settings`; its ``output.dir`` is the sweep's.
      grid: values by setting, or words: ``"train.learning_rate=1e-4,3e-4"``,
        ``"seed=0..2"`` (``seed`` is ``train.seed``). A setting with a single value has
        it in all runs.
      zipped: whether the n-th values belong together, instead of all combinations.

    Returns:
      The runs; the last setting of the grid varies fastest.

    Raises:
      FileNotFoundError: if there is no such config.
      ValueError: naming every fault of the grid and of its runs' settings.
      UserError: if a setting is swept that the runs must have alike.
    """
    axes, faults = read_axes(grid, zipped=zipped)
    lengths = {key: len(values) for key, values in axes.items() if len(values) > 1}
    if not zipped and (total := math.prod(lengths.values())) > MOST_RUNS:
        faults.append(f"it must have at most {MOST_RUNS:,} runs; got {total:,}")
    if zipped and len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        faults.append(f"zipped settings must have as many values each; {shown}")
    if faults:
        raise ValueError("the grid: " + "\n  ".join(["", *faults]).lstrip())
    if zipped:
        count = max(lengths.values(), default=1)
        combined = [
            [values[i % len(values)] for values in axes.values()] for i in range(count)
        ]
    else:
        combined = itertools.product(*axes.values())
    points, found = [], {}
    for number, values in enumerate(combined):
        chosen = dict(zip(axes, values, strict=True))
        words = [f"{key}={value}" for key, value in chosen.items()]
        try:
            settings = load_settings(config, words)
        except ValueError as error:
            _, *lines = str(error).split("\n")
            found.update(dict.fromkeys(lines or [str(error)]))
            continue
        varied = {key: value for key, value in chosen.items() if key in lengths}
        name = _name(number, varied)
        folder = Path(settings.output.dir) / name
        output = dataclasses.replace(settings.output, dir=str(folder))
        settings = dataclasses.replace(settings, output=output)
        points.append(Point(name, varied, settings))
    if found:
        raise ValueError("the grid: faults in the settings\n" + "\n".join(found))
    if any(point.settings.lora.init == "eva" for point in points):
        raise UserError(
            "lora.init = eva can't be swept: the runs of a sweep share their layers, "
            "and each of these chooses its own. Train such runs with `lora-jax train`."
        )
    for key in lengths:
        why = MESH if key.startswith("mesh.") else FIXED.get(key)
        if key == "data.train" and points[0].settings.data.validation is None:
            why = f"{ALIKE}: set data.validation, as each would hold out its own"
        if why:
            raise UserError(f"{key} can't be swept: {why}.")
    _check_distinct(points)
    return points


def _check_distinct(points: Sequence[Point]) -> None:
    """Raises a `ValueError` if runs are the same, maybe with values spelled apart."""
    named: dict[str, list[str]] = {}
    for point in points:
        tree = {**point.settings.to_dict(), "output": None}
        named.setdefault(json.dumps(tree, sort_keys=True), []).append(point.name)
    if same := [" and ".join(names) for names in named.values() if len(names) > 1]:
        shown = ", ".join(same[:MOST_SHOWN]) + ", ..." * (len(same) > MOST_SHOWN)
        raise ValueError(f"the grid: runs must differ in a setting; got {shown}.")


def groups(points: Sequence[Point]) -> tuple[list[list[Point]], list[str]]:
    """Sorts runs into those that can share a compiled step.

    Args:
      points: the runs.

    Returns:
      The groups, each in the order of the points; and the settings they differ in.
    """
    found: dict[str, list[Point]] = {}
    shared = []
    for point in points:
        tree = point.settings.to_dict()
        flat = {f"{s}.{k}": v for s, values in tree.items() for k, v in values.items()}
        # Starts from factors of W0 have leaves that others haven't.
        flat["lora.init"] = point.settings.lora.starts_from_base
        shared.append({k: v for k, v in flat.items() if k not in OWN})
        found.setdefault(json.dumps(shared[-1]), []).append(point)
    differing = [k for k in shared[0] if any(s[k] != shared[0][k] for s in shared)]
    return [*found.values()], differing


def shared_config(lora: Any, tables: Sequence[Sequence[Target]]) -> Any:
    """Returns the config of the shared module: the largest ranks, a scaling of 1.

    Args:
      lora: of one of the runs.
      tables: the targets of all of them.

    Returns:
      The config.
    """
    ranks: dict[str, int] = {}
    for target in (target for table in tables for target in table):
        ranks[target.path] = max(target.rank, ranks.get(target.path, 0))
    # The longest path first: a shorter one may be the end of it.
    pattern = {re.escape(p): ranks[p] for p in sorted(ranks, key=len, reverse=True)}
    if len(set(ranks.values())) == 1:
        pattern = {}
    rank = max(ranks.values())
    return dataclasses.replace(
        lora,
        rank=rank,
        alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        rslora=False,
        init="olora" if lora.starts_from_base else "uniform",  # fits every rank
    )


def _name(number: int, values: Mapping[str, str]) -> str:
    parts = [
        f"{key.partition('.')[2]}={Path(value).stem if '/' in value else value}"
        for key, value in values.items()
    ]
    name = "_".join([f"{number:03d}", *parts])
    return re.sub(r"[^\w.=+-]+", "-", name)[:100]
