"""The table and the plot of `run.py`, from the recorded runs."""

import math
import statistics
from pathlib import Path

from experiments.drawing import curve, panels, save, table
from experiments.recorded import Runs
from experiments.short import mean_sd

RATE = "train.learning_rate"
PLAIN = "LoRA"


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def report(runs: Runs, results: Path) -> None:
    """Writes ``table.md`` and ``methods.png``.

    Args:
      runs: the recorded runs.
      results: the folder to write to.
    """
    names = [part.removesuffix(", seeds") for part in runs.parts() if "seeds" in part]
    tuning = {name: runs.of(f"{name}, tuning") for name in names}
    final = {name: runs.of(f"{name}, seeds") for name in names}
    plain = {row["train.seed"]: row for row in final[PLAIN]}
    rates = sorted({row[RATE] for name in names for row in tuning[name]})
    trained = {row["method"]: row["trained"] for row in runs.of("parameters")}
    rows = []
    for name in names:
        losses = {row[RATE]: row["loss"] for row in tuning[name]}
        best = min(losses, key=lambda rate: losses[rate] or math.inf)
        shown = ["–" if r not in losses else _loss(losses[r]) for r in rates]
        shown[rates.index(best)] = f"**{shown[rates.index(best)]}**"
        differences = [
            100 * (row["test_accuracy"] - plain[row["train.seed"]]["test_accuracy"])
            for row in final[name]
        ]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        mean = statistics.mean(differences)
        rows.append(
            [
                name,
                f"{trained.get(name, 0):,}",
                *shown,
                mean_sd([row["test_loss"] for row in final[name]]),
                mean_sd([100 * row["test_accuracy"] for row in final[name]], digits=2),
                "–" if name == PLAIN else f"{mean:+.2f} ± {error:.2f}",
            ]
        )
    head = ["method", "trained", *(f"{rate:g}" for rate in rates)]
    head += ["test loss", "test accuracy, %", "- LoRA's, ± standard error"]
    (results / "table.md").write_text(table(head, rows))
    print(table(head, rows))

    figure, (left, right) = panels(["Tuning, one seed", "Fresh seeds"], 4.8, 4.2)
    for i, name in enumerate(names):
        points = {row[RATE]: [row["loss"]] for row in tuning[name] if row["loss"]}
        curve(left, points, name, f"C{i}" if i < 10 else "0.3")
        values = [100 * row["test_accuracy"] for row in final[name]]
        y, color = len(names) - 1 - i, f"C{i}" if i < 10 else "0.3"
        right.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
        right.plot([statistics.mean(values)], [y], "|", color=color, ms=18, mew=2.5)
    left.set_xscale("log")
    left.set_ylim(top=0.72)
    left.set(xlabel="learning rate", ylabel="validation loss, nats")
    left.legend(fontsize=8, frameon=False)
    right.set_yticks(range(len(names)), reversed(names))
    right.set_ylim(-0.6, len(names) - 0.4)
    right.set_xlabel("test accuracy, %  (dots: seeds, bar: mean)")
    save(figure, results / "methods.png")
