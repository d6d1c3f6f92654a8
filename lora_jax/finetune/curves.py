"""Plotting curves.png, a run's metrics over its steps, and sweep.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.files.atomic import new_file
from lora_jax.finetune.settings import RunSettings

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#8a8a8a"


def draw_curves(
    lines: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    metrics: Sequence[str],
    baseline: tuple[str, float] | None,
    chosen: int | None,
) -> bool:
    """Plots the metrics in metrics.jsonl: each one's training and validation curve.

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
    made = _axes(len(metrics), size=(5 * len(metrics), 3.8))
    if not made:
        return False
    axes = dict(zip(metrics, made, strict=True))
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
    if "accuracy" in axes:
        axes["accuracy"].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes["loss"].set_ylim(bottom=0)
    axes["loss"].legend(frameon=False)
    axes["loss"].figure.suptitle(title)
    _write(axes["loss"], path)
    return True


def draw_sweep(
    settings: Sequence[RunSettings],
    lines: Sequence[Mapping[str, Any]],
    path: Path,
    metric: str,
) -> bool:
    """Plots the validation metric of a sweep's runs against the learning rate, by rank.

    A line goes through the mean of a rank's runs at each learning rate.

    Args:
      settings: of the runs.
      lines: how they ended, in the same order.
      path: the image file to write.
      metric: that selects the best.

    Returns:
      False if matplotlib is not installed and nothing was drawn.
    """
    made = _axes(1, size=(6, 4))
    if not made:
        return False
    ranks: dict[int, dict[float, list[float]]] = {}
    for own, line in zip(settings, lines, strict=True):
        value = line["validation"] and line["validation"].get(metric)
        if value is not None:
            rates = ranks.setdefault(own.lora.rank, {})
            rates.setdefault(own.train.learning_rate, []).append(value)
    (axis,) = made
    for rank, rates in sorted(ranks.items()):
        means = [(x, sum(ys) / len(ys)) for x, ys in sorted(rates.items())]
        (drawn,) = axis.plot(*zip(*means, strict=True), label=f"rank {rank}")
        points = [(x, y) for x, ys in rates.items() for y in ys]
        axis.plot(*zip(*points, strict=True), "o", color=drawn.get_color(), alpha=0.6)
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"validation {metric}")
    if ranks:
        axis.legend(frameon=False)
    _write(axis, path)
    return True


def _axes(count: int, *, size: tuple[float, float]) -> list[Any]:
    """Returns the axes of a new figure, side by side; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []

    # Not pyplot, which would change a notebook's backend.
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return [*axes]


def _write(axis: Any, path: Path) -> None:
    with new_file(path) as new:
        axis.figure.savefig(new, dpi=130, format="png")


def _series(
    lines: Sequence[dict[str, Any]], split: str, name: str
) -> tuple[list[int], list[float]]:
    points = [
        (line["step"], line[name])
        for line in lines
        if line.get("split") == split and line.get(name) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]
