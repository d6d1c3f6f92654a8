"""The tables and the plot of `run.py`, from the recorded runs."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.drawing import curve, panels, save, table
from experiments.recorded import Runs
from experiments.short import mean_sd

RATE, RANK = "train.learning_rate", "lora.rank"
Points = dict[float, list[float]]


class Optimum(NamedTuple):
    """The best learning rate of a contender.

    Attributes:
      rate: of the grid, with the lowest mean loss.
      fitted: the minimum of the parabola through the means there and at its neighbours,
        over the logarithm of the rate; None at an end of the grid.
      losses: of the runs at ``rate``.
    """

    rate: float
    fitted: float | None
    losses: list[float]


def optimum(points: Points) -> Optimum:
    """Finds the best learning rate.

    Args:
      points: the losses of the runs by learning rate.

    Returns:
      The optimum.

    Example:
      >>> found = optimum({0.01: [2.0], 0.1: [1.0], 1.0: [2.0]})
      >>> found.rate, round(found.fitted, 3)
      (0.1, 0.1)
    """
    rates = sorted(points)
    means = [statistics.mean(points[rate]) for rate in rates]
    at = int(np.argmin(means))
    fitted = None
    if 0 < at < len(rates) - 1:
        near = [math.log10(rate) for rate in rates[at - 1 : at + 2]]
        square, linear, _ = np.polyfit(near, means[at - 1 : at + 2], 2)
        fitted = float(10 ** (-linear / (2 * square)))
    return Optimum(rates[at], fitted, points[rates[at]])


def contenders(runs: Runs) -> dict[str, Points]:
    """Returns the validation losses of each contender by learning rate.

    Args:
      runs: the recorded runs.

    Returns:
      Points by name, without runs that diverged.
    """
    ranks = runs.of("ranks")
    rows: dict[str, list[dict[str, Any]]] = {"full": runs.of("full")}
    for rank in sorted({row[RANK] for row in ranks}):
        rows[f"LoRA r {rank}"] = [row for row in ranks if row[RANK] == rank]
    rows["LoRA r 72, attention"] = runs.of("attention")
    rows["full, batch 64"] = runs.of("full, large batch")
    rows["LoRA r 32, batch 64"] = runs.of("large batch")
    found: dict[str, Points] = {}
    for name, part in rows.items():
        for row in part:
            if row["loss"] is not None:
                found.setdefault(name, {}).setdefault(row[RATE], []).append(row["loss"])
    return found


def report(runs: Runs, results: Path) -> None:
    """Writes ``table.md``, ``rates.md`` and ``losses.png``.

    Args:
      runs: the recorded runs.
      results: the folder to write to.
    """
    found = contenders(runs)
    best = {name: optimum(points) for name, points in found.items()}
    rows = []
    for name, one in best.items():
        base = best["full, batch 64" if name.endswith("batch 64") else "full"]
        ratio = "–"
        if one.fitted and base.fitted and one is not base:
            ratio = f"{one.fitted / base.fitted:.1f}"
        gap = statistics.mean(one.losses) - statistics.mean(base.losses)
        rows.append(
            [
                name,
                f"{one.rate:g}",
                f"{one.fitted:.2g}" if one.fitted else "at the grid's end",
                ratio,
                mean_sd(one.losses),
                "–" if one is base else f"{gap:+.3f}",
            ]
        )
    head = [
        "contender",
        "best rate of the grid",
        "fitted optimum",
        "/ full's",
        "validation loss there",
        "- full's",
    ]
    (results / "table.md").write_text(table(head, rows))
    print(table(head, rows))
    rates = sorted({rate for points in found.values() for rate in points})
    rows = [
        [name, *(mean_sd(points[r]) if r in points else "–" for r in rates)]
        for name, points in found.items()
    ]
    head = ["validation loss", *(f"{rate:g}" for rate in rates)]
    (results / "rates.md").write_text(table(head, rows))
    print(table(head, rows))
    _draw(found, results / "losses.png")


def _draw(found: dict[str, Points], path: Path) -> None:
    figure, axes = panels(["Ranks", "Layers, at equal parameters", "Batch size"])
    shown = (
        {name: {} for name in found if "," not in name},
        {"full": {}, "LoRA r 32": {}, "LoRA r 72, attention": {}},
        {
            "full": {},
            "full, batch 64": {"ls": "--"},
            "LoRA r 32": {},
            "LoRA r 32, batch 64": {"ls": "--"},
        },
    )
    colors = {"full": "0.3", "full, batch 64": "0.3", "LoRA r 32, batch 64": "C0"}
    colors |= {"LoRA r 32": "C0", "LoRA r 72, attention": "C3"}
    others = iter(("C1", "C2", "C4"))
    for name in found:
        if name not in colors:
            colors[name] = next(others)
    worst = max(max(map(statistics.mean, p.values())) for p in found.values())
    lowest = min(min(map(min, p.values())) for p in found.values())
    for axis, names in zip(axes, shown, strict=True):
        for name in [name for name in names if name in found]:
            style = names[name]
            curve(axis, found[name], name, colors[name], **style)
        axis.set_xscale("log")
        axis.set_ylim(lowest - 0.02, min(worst, 0.75) + 0.02)
        axis.set_xlabel("learning rate")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("validation loss, nats  (dots: seeds)")
    save(figure, path)
