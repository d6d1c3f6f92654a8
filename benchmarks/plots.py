"""Plots of results files: step time by contender, cost by length and by rank."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import contenders, lengths

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen
from matplotlib.ticker import LogLocator

BLUE, LIGHT, ORANGE, GREY = "#3b6ea8", "#9dbbdc", "#d9822b", "#b5b5b5"
Rows = list[dict[str, Any]]


def draw(comparison: str, rows: Rows, path: Path) -> None:
    """Plots the results of a comparison.

    Args:
      comparison: its name; does nothing for those without a plot.
      rows: its measurements.
      path: the image file to write.
    """
    if comparison not in PICTURES:
        return
    figure = PICTURES[comparison](rows)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _contenders(rows: Rows) -> Any:
    """Draws a bar per contender, fastest first, with quartiles and ratio to ours."""
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(6.2 * columns, 3.1 * lines),
        layout="constrained",
        squeeze=False,
    )
    for axis in grid.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(grid.flat, rows, strict=False):
        timed = {name: found for name, found in row.items() if isinstance(found, dict)}
        names = sorted(timed, key=lambda name: -timed[name]["median_ms"])
        medians = [timed[name]["median_ms"] for name in names]
        low, high = zip(*(timed[name]["quartiles_ms"] for name in names), strict=True)
        spread = [
            [m - q for m, q in zip(medians, low, strict=True)],
            [q - m for m, q in zip(medians, high, strict=True)],
        ]
        axis.barh(names, medians, color=[_color(n) for n in names], height=0.7)
        axis.errorbar(medians, names, xerr=spread, fmt="none", ecolor="#444", capsize=2)
        own = row[contenders.OURS]["median_ms"]
        for name, median, top in zip(names, medians, high, strict=True):
            axis.annotate(
                f"x {median / own:.2f}",
                (top, name),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xlim(0, 1.12 * max(high))
        axis.set_title(row["shape"], fontsize=10)
        axis.set_xlabel("ms per step, median and quartiles", fontsize=9)
        axis.tick_params(labelsize=9)
    return figure


def _color(name: str) -> str:
    if name == contenders.OURS:
        return BLUE
    return LIGHT if name.startswith(contenders.OURS) else GREY


def _lengths(rows: Rows) -> Any:
    """Draws temporaries and time against tokens per row, on logarithmic axes."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    names = {lengths.OURS: BLUE, lengths.BLOCK: LIGHT, lengths.PLAIN: ORANGE}
    for name, color in names.items():
        style = {"color": color, "marker": "o", "label": name, "linewidth": 2}
        for axis, key, unit in ((memory, "temp_bytes", 1e6), (time, "median_ms", 1)):
            known = [row for row in rows if row[name][key] is not None]
            at = [row["tokens"] for row in known]
            axis.plot(at, [row[name][key] / unit for row in known], **style)
    limit = rows[0]["limit_bytes"] / 1e6
    memory.axhline(limit, color=GREY, linestyle="--", linewidth=1)
    memory.annotate("not run above this", (tokens[0], limit), va="bottom", fontsize=8)
    memory.set(ylabel="temporaries, MB")
    time.set(ylabel="ms per step, median")
    for axis in (memory, time):
        axis.set(xscale="log", yscale="log", xlabel="tokens per row")
        axis.set_xticks(tokens, [f"{t:,}" for t in tokens])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    time.legend(frameon=False, fontsize=9)
    return figure


def _overhead(rows: Rows) -> Any:
    """Draws the overhead of unmerged adapters by rank, and the formula."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    (row,) = rows
    base = row["base"]
    ranks = [name for name in row if name.startswith("rank ")]
    numbers = [int(name.split()[1]) for name in ranks]

    def line(label: str, values: Iterable[float], *style: str) -> None:
        color, marker, dashes = style
        percent = [100 * value for value in values]
        axis.plot(numbers, percent, dashes, color=color, marker=marker, label=label)

    def over_base(key: str) -> Iterable[float]:
        return (row[name][key] / base[key] - 1 for name in ranks)

    line("time", over_base("median_ms"), ORANGE, "o", "-")
    if base["flops"]:
        line("FLOPs, by XLA", over_base("flops"), BLUE, "o", "-")
    formula = (row[name]["formula"] for name in ranks)
    line("r (in + out) / (in out)", formula, "#444", "", "--")
    axis.set(
        xscale="log",
        xlabel="rank, all linears",
        ylabel="overhead over the base's forward pass, %",
    )
    axis.set_ylim(bottom=0)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    return figure


def _compiled(rows: Rows) -> Any:
    """Draws the decoder's time and temporaries, a line of pictures per target."""
    units = {"cycles": (1e6, "cycles, millions"), "microseconds": (1e3, "ms")}
    shown = [
        (row, key)
        for row in rows
        for key in units
        if row["shape"] == rows[0]["shape"] and key in row.get(contenders.OURS, {})
    ]
    size = (10, 0.9 + 2.6 * len(shown))
    figure, grid = plt.subplots(
        len(shown), 2, figsize=size, layout="constrained", squeeze=False
    )
    figure.suptitle(
        f"{rows[0]['shape']}: the compiler's estimate, not a measurement", fontsize=10
    )
    for (left, right), (row, key) in zip(grid, shown, strict=True):
        known = {n: f for n, f in row.items() if isinstance(f, dict) and key in f}
        names = sorted(known, key=lambda name: -known[name][key])
        colors = [_color(name) for name in names]
        divisor, unit = units[key]
        times = [known[name][key] / divisor for name in names]
        left.barh(names, times, color=colors)
        right.barh(names, [known[n]["temp_bytes"] / 1e6 for n in names], color=colors)
        right.set_yticklabels([])
        left.set(title=row["target"], xlabel=unit)
        right.set(title=row["target"], xlabel="temporaries, MB")
        for axis in (left, right):
            axis.tick_params(labelsize=9)
    return figure


def _bfloat16(rows: Rows) -> Any:
    """Draws the loss of each step in both dtypes."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for row, color in zip(rows, (BLUE, ORANGE), strict=True):
        steps = range(1, len(row["losses"]) + 1)
        axis.plot(steps, row["losses"], color=color, lw=1, label=row["dtype"])
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(frameon=False, fontsize=9)
    return figure


PICTURES: dict[str, Callable[[Rows], Any]] = {
    "contenders": _contenders,
    "lengths": _lengths,
    "overhead": _overhead,
    "compiled": _compiled,
    "bfloat16": _bfloat16,
}
