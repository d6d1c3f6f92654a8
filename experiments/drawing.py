"""What the plots of the short experiments share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def panels(titles: Sequence[str], width: float = 4.4, height: float = 3.8) -> Any:
    """Makes a figure with a panel for each title, side by side.

    Args:
      titles: of the panels.
      width: of a panel, in inches.
      height: of the figure.

    Returns:
      The figure and its axes.
    """
    size = (width * len(titles), height)
    figure, grid = plt.subplots(
        1, len(titles), figsize=size, layout="constrained", squeeze=False
    )
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, grid[0]


def curve(
    axis: Any, points: dict[Any, list[float]], label: str, color: str, **style: Any
) -> None:
    """Draws a line through the means at each x, and a dot for each run.

    Args:
      axis: the panel.
      points: the runs' values by x.
      label: in the legend.
      color: of both.
      **style: of the line.
    """
    xs = sorted(points)
    means = [sum(points[x]) / len(points[x]) for x in xs]
    axis.plot(xs, means, color=color, label=label, **style)
    dots = [(x, y) for x in xs for y in points[x]]
    axis.plot(*zip(*dots, strict=True), "o", color=color, alpha=0.4, ms=3.5, mew=0)


def save(figure: Any, path: Path) -> None:
    """Writes the figure and forgets it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
