"""curves.png: loss and accuracy over the steps, as metrics.jsonl has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#8a8a8a"


def draw_curves(
    lines: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    baseline: float | None = None,
    chosen: int | None = None,
) -> bool:
    """Draws loss and accuracy, training and validation.

    Args:
      lines: of metrics.jsonl.
      path: the picture to write.
      title: above both panels.
      baseline: validation accuracy of the frozen base with a linear head, as a line.
      chosen: the step whose adapter was kept, as a mark.

    Returns:
      False if matplotlib is not installed and nothing was drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        train = _series(lines, "train", name)
        validation = _series(lines, "validation", name)
        axis.plot(
            *train, color=BLUE, alpha=0.45, linewidth=1.2, label="train (per log)"
        )
        axis.plot(
            *validation, color=ORANGE, marker="o", linewidth=2, label="validation"
        )
        if name == "accuracy" and baseline is not None:
            axis.axhline(baseline, color=GREY, linestyle="--", linewidth=1.2)
            axis.annotate(
                f"frozen base + linear head: {baseline:.1%}",
                (1, baseline),
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
    axes[1].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
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
