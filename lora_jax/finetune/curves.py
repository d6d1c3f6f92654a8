"""curves.png: the metrics over the steps, as metrics.jsonl has them."""

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
    """Draws each metric, training and validation.

    Args:
      lines: of metrics.jsonl.
      path: the picture to write.
      title: above the panels.
      metrics: a panel each.
      baseline: what the frozen base is called, and its value of the last metric on
        validation, as a line.
      chosen: the step whose adapter was kept, as a mark.

    Returns:
      False if matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    # Not by pyplot, which would change the backend of a notebook.
    figure = Figure(figsize=(5 * len(metrics), 3.8), layout="constrained")
    grid = figure.subplots(1, len(metrics), squeeze=False)
    axes = dict(zip(metrics, grid[0], strict=True))
    for name, axis in axes.items():
        train = _series(lines, "train", name)
        validation = _series(lines, "validation", name)
        axis.plot(
            *train, color=BLUE, alpha=0.45, linewidth=1.2, label="train (per log)"
        )
        axis.plot(
            *validation, color=ORANGE, marker="o", linewidth=2, label="validation"
        )
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
        for step, value in zip(*validation, strict=True):
            if step == chosen:
                axis.plot(
                    step, value, "o", color=ORANGE, markersize=11, fillstyle="none"
                )
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
