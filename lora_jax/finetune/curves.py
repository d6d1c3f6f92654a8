"""Plotting curves.png: the metrics in metrics.jsonl over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.files.atomic import new_file

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#8a8a8a"


def draw_curves(
    lines: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    metrics: Sequence[str] = ("loss", "accuracy"),
    baseline: tuple[str, float] | None = None,
    chosen: int | None = None,
) -> bool:
    """Plots the training and validation curve of each metric.

    Args:
      lines: the lines of metrics.jsonl.
      path: the image file to write.
      title: title of the figure.
      metrics: the metrics, one panel each.
      baseline: name and last validation metric of the frozen base, drawn as a line.
      chosen: the step whose adapter was kept, drawn as a marker.

    Returns:
      False if matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    # Not pyplot, which would change a notebook's backend.
    figure = Figure(figsize=(5 * len(metrics), 3.8), layout="constrained")
    grid = figure.subplots(1, len(metrics), squeeze=False)
    axes = dict(zip(metrics, grid[0], strict=True))
    for name, axis in axes.items():
        train = _series(lines, "train", name)
        validation = _series(lines, "validation", name)
        style: dict[str, Any] = {"color": BLUE, "alpha": 0.45, "linewidth": 1.2}
        axis.plot(*train, label="train (per log)", **style)
        style = {"color": ORANGE, "marker": "o", "linewidth": 2}
        axis.plot(*validation, label="validation", **style)
        if name == metrics[-1] and baseline is not None:
            what, value = baseline
            shown = f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
            axis.axhline(value, color=GREY, linestyle="--", linewidth=1.2)
            axis.annotate(
                f"{what}: {shown}",
                (1, value),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(-4, 4),
                ha="right",
                color=GREY,
                fontsize=9,
            )
        kept = [(x, y) for x, y in zip(*validation, strict=True) if x == chosen]
        for point in kept:
            axis.plot(*point, "o", color=ORANGE, markersize=11, fillstyle="none")
        axis.set(xlabel="step", ylabel=name, title=name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if "accuracy" in axes:
        axes["accuracy"].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes["loss"].set_ylim(bottom=0)
    axes["loss"].legend(frameon=False)
    figure.suptitle(title)
    with new_file(path) as new:
        figure.savefig(new, dpi=130, format="png")
    return True


def _series(
    lines: Sequence[dict[str, Any]], split: str, name: str
) -> tuple[list[int], list[float]]:
    points = [
        (line["step"], line[name])
        for line in lines
        if line.get("split") == split and line.get(name) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]
