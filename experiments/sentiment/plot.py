"""The plot of `run.py`: test accuracy of each method by number of parameters."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots test accuracy against the number of trained parameters."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, row in enumerate(rows):
        xs = [row["trainable"]] * len(row["test"])
        marker = "o" if row["method"] == "lora" else "s"
        color = f"C{index}"
        axes.plot(xs, row["test"], marker, color=color, alpha=0.45)
        mean = statistics.mean(row["test"])
        axes.plot(xs[:1], [mean], "_", color=color, markersize=22, markeredgewidth=2.5)
        axes.plot([], [], marker, color=color, label=row["name"])
        if row["method"] == "full":
            name = "mean of full fine-tuning - 0.5"
            axes.axhline(mean - 0.5, color="0.6", linestyle="--", lw=1, label=name)
    axes.set_xscale("log")
    axes.set_xlim(3e2, 1e8)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test accuracy, %  (dots: seeds, bar: mean)")
    axes.legend(fontsize=9, loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
