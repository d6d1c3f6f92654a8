"""Plotting sweep.png: the validation metric against the learning rate, by rank."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.files.atomic import new_file
from lora_jax.finetune.settings import RunSettings

PLOT = "sweep.png"


def draw_sweep(
    settings: Sequence[RunSettings],
    lines: Sequence[Mapping[str, Any]],
    path: Path,
    metric: str,
) -> bool:
    """Plots each rank's runs, and a line through their means at each learning rate.

    Args:
      settings: of the runs.
      lines: how they ended, in the same order.
      path: the image file to write.
      metric: that selects the best.

    Returns:
      False if matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    ranks: dict[int, dict[float, list[float]]] = {}
    for own, line in zip(settings, lines, strict=True):
        value = line["validation"] and line["validation"].get(metric)
        if value is not None:
            rates = ranks.setdefault(own.lora.rank, {})
            rates.setdefault(own.train.learning_rate, []).append(value)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for rank, rates in sorted(ranks.items()):
        means = [(x, sum(ys) / len(ys)) for x, ys in sorted(rates.items())]
        (drawn,) = axis.plot(*zip(*means, strict=True), label=f"rank {rank}")
        points = [(x, y) for x, ys in rates.items() for y in ys]
        axis.plot(*zip(*points, strict=True), "o", color=drawn.get_color(), alpha=0.6)
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"validation {metric}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if ranks:
        axis.legend(frameon=False)
    with new_file(path) as new:
        figure.savefig(new, dpi=130, format="png")
    return True
