"""The table and the plot of `run.py`, from the recorded runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.drawing import curve, panels, save, table
from experiments.methods import language
from experiments.recorded import Runs
from experiments.short import mean_sd

RATE = "train.learning_rate"
PLAIN = "LoRA"
Rows = dict[str, list[dict[str, Any]]]  # by contender


class Measure(NamedTuple):
    """What contenders are compared by.

    Attributes:
      name: in the recorded rows.
      scale: of what is shown.
      label: with its unit.
      digits: after the point.
    """

    name: str
    scale: float
    label: str
    digits: int


ACCURACY = Measure("test_accuracy", 100, "test accuracy, %", 2)
LOSS = Measure("test_loss", 1, "test loss", 3)


def report(runs: Runs, results: Path) -> None:
    """Writes ``table.md`` and ``methods.png``, and the same of the language model.

    Args:
      runs: the recorded runs.
      results: the folder to write to.
    """
    names = _contenders(runs)
    tuning = {name: runs.of(f"{name}, tuning") for name in names}
    trained = {row["method"]: row["trained"] for row in runs.of("parameters")}
    counts = [f"{trained.get(name, 0):,}" for name in names]
    _write(runs, tuning, results, (LOSS, ACCURACY), {"trained": counts}, most=0.72)
    runs = runs.part("language")
    if names := _contenders(runs):
        tuning = {name: language.tuning(runs, name) for name in names}
        _write(runs, tuning, results / "language", (LOSS,))


def _contenders(runs: Runs) -> list[str]:
    return [part.removesuffix(", seeds") for part in runs.parts() if "seeds" in part]


def _write(
    runs: Runs,
    tuning: Rows,
    results: Path,
    measures: Sequence[Measure],
    more: Mapping[str, Sequence[str]] | None = None,
    most: float | None = None,
) -> None:
    """Writes a table and a plot; the last measure is compared seed by seed."""
    names, more = list(tuning), more or {}
    final = {name: runs.of(f"{name}, seeds") for name in names}
    *_, by = measures
    plain = {row["train.seed"]: row[by.name] for row in final[PLAIN]}
    rates = sorted({row[RATE] for name in names for row in tuning[name]})
    rows = []
    for i, name in enumerate(names):
        losses = {row[RATE]: row["loss"] for row in tuning[name]}
        best = min(losses, key=lambda rate: losses[rate] or math.inf)
        shown = ["–" if r not in losses else _loss(losses[r]) for r in rates]
        shown[rates.index(best)] = f"**{shown[rates.index(best)]}**"
        found = [
            mean_sd([row[m.name] for row in final[name]], m.scale, m.digits)
            for m in measures
        ]
        apart = [by.scale * (r[by.name] - plain[r["train.seed"]]) for r in final[name]]
        error = statistics.stdev(apart) / math.sqrt(len(apart))
        mean = f"{statistics.mean(apart):+.{by.digits}f} ± {error:.{by.digits}f}"
        last = "–" if name == PLAIN else mean
        rows.append([name, *(v[i] for v in more.values()), *shown, *found, last])
    head = ["method", *more, *(f"{rate:g}" for rate in rates)]
    head += [*(m.label for m in measures), "- LoRA's, ± standard error"]
    (results / "table.md").write_text(table(head, rows))
    print(table(head, rows))

    figure, (left, right) = panels(["Tuning, one seed", "Fresh seeds"], 4.8, 4.2)
    for i, name in enumerate(names):
        points = {row[RATE]: [row["loss"]] for row in tuning[name] if row["loss"]}
        color = f"C{i}" if i < 10 else "0.3"
        curve(left, points, name, color)
        values = [by.scale * row[by.name] for row in final[name]]
        y = len(names) - 1 - i
        right.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
        right.plot([statistics.mean(values)], [y], "|", color=color, ms=18, mew=2.5)
    left.set_xscale("log")
    if most is not None:
        left.set_ylim(top=most)
    left.set(xlabel="learning rate", ylabel="validation loss, nats")
    left.legend(fontsize=8, frameon=False)
    right.set_yticks(range(len(names)), reversed(names))
    right.set_ylim(-0.6, len(names) - 0.4)
    right.set_xlabel(f"{by.label}  (dots: seeds, bar: mean)")
    save(figure, results / "methods.png")


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"
