"""The runs that a grid of settings describes, and which of them can share a step."""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.settings import SECTIONS, Config, RunSettings, load_settings
from lora_jax.tree.targets import Target

Grid = Mapping[str, Sequence[Any]] | Sequence[str]

SHORT = {"seed": "train.seed"}
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
FIXED = {
    "output.dir": "it is the sweep's own folder",
    **dict.fromkeys(
        ("data.validation", "data.test", "data.holdout", "data.seed"),
        "runs are compared by their metrics on the same examples",
    ),
}
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
    axes, faults = _axes(grid, zipped)
    lengths = {key: len(values) for key, values in axes.items() if len(values) > 1}
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
        if why:
            raise UserError(f"{key} can't be swept: {why}.")
    return points


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


def _axes(grid: Grid, zipped: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the values of each setting as texts, and what is wrong with the grid."""
    if isinstance(grid, Mapping):
        items = [(key, [_text(v) for v in values]) for key, values in grid.items()]
    else:
        items = [_parse(word) for word in grid]
    axes: dict[str, list[str]] = {}
    faults = []
    known = [
        f"{section}.{field.name}"
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    ]
    for key, values in items:
        key = SHORT.get(key, key)
        if key not in known:
            ends = {name.partition(".")[2]: name for name in reversed(known)}
            near = difflib.get_close_matches(key, known, n=1) or [
                ends[end] for end in difflib.get_close_matches(key, ends, n=1)
            ]
            hint = f"Did you mean {near[0]!r}?" if near else "It is section.key."
            faults.append(f"{key}: unknown setting. {hint}")
        elif key in axes:
            faults.append(f"{key}: given twice")
        elif not values:
            faults.append(f"{key}: no values, so there is no run")
        elif len(set(values)) < len(values) and not zipped:
            faults.append(f"{key}: the same value twice; got {', '.join(values)}")
        axes.setdefault(key, values)
    if not axes:
        faults.append("no setting is given, like train.learning_rate=1e-4,3e-4")
    return axes, faults


def _parse(word: str) -> tuple[str, list[str]]:
    """Splits ``key=v1,v2`` and ``key=0..2``."""
    key, _, text = word.partition("=")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        return key, [str(n) for n in range(int(ends[1]), int(ends[2]) + 1)]
    # Commas inside brackets and quotes don't separate values.
    pieces = re.findall(r"""(?:\[[^]]*]|\{[^}]*}|"[^"]*"|'[^']*'|[^,])+""", text)
    return key, [piece.strip() for piece in pieces]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(number: int, values: Mapping[str, str]) -> str:
    parts = [
        f"{key.partition('.')[2]}={Path(value).stem if '/' in value else value}"
        for key, value in values.items()
    ]
    name = "_".join([f"{number:03d}", *parts])
    return re.sub(r"[^\w.=+-]+", "-", name)[:100]
