"""The tables and the plot of `run.py`, from the recorded runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.drawing import panels, save, table
from experiments.recorded import Runs
from experiments.short import mean_sd

OWN = "own"
NAMES = {
    "all": "one adapter on all",
    OWN: "each domain's own adapter",
    "cat": "cat: the exact sum",
    "svd": "svd",
    "ties": "ties",
    "dare": "dare",
    "dare_ties": "dare_ties",
}


def report(runs: Runs, results: Path) -> None:
    """Writes ``table.md``, ``merged.md`` and ``accuracy.png``.

    Args:
      runs: the recorded runs.
      results: the folder to write to.
    """
    each, merged = runs.of("each"), runs.of("merged")
    domains = list(dict.fromkeys(row["on"] for row in each))
    own = [{**row, "domain": OWN} for row in each if row["domain"] == row["on"]]
    found = {
        name: _by_seed([row for row in [*each, *own] if row["domain"] == name], domains)
        for name in [*domains, "all", OWN]
    }
    rules = list(dict.fromkeys(row["rule"] for row in merged))
    found |= {
        name: _by_seed([row for row in merged if row["rule"] == name], domains)
        for name in rules
    }
    text = table(
        ["adapter, tuned rate", *(f"on {name}" for name in domains), "mean"],
        [
            [f"{NAMES.get(name, name)}, {_rate(each, name)}", *_cells(found[name])]
            for name in [*domains, "all"]
        ],
    )
    (results / "table.md").write_text(text)
    chosen = {row["rule"]: row for row in merged}
    rows = [
        [
            NAMES[name],
            f"{chosen[name]['weight']:g}" if name in chosen else "–",
            _cut([row for row in merged if row["rule"] == name]),
            *_cells(found[name]),
        ]
        for name in [OWN, "all", *rules]
    ]
    head = ["", "weight", "cut off", *(f"on {name}" for name in domains), "mean"]
    (results / "merged.md").write_text(table(head, rows))
    print(text, table(head, rows), sep="\n")
    _draw(found, domains, rules, results / "accuracy.png")


def _by_seed(rows: Sequence[dict[str, Any]], domains: Sequence[str]) -> list[list]:
    """Returns a list of accuracies in percent for each seed, one per domain."""
    scores = {(row["seed"], row["on"]): 100 * row["accuracy"] for row in rows}
    seeds = sorted({seed for seed, _ in scores})
    return [[scores[seed, name] for name in domains] for seed in seeds]


def _cells(found: list[list[float]]) -> list[str]:
    columns = [*map(list, zip(*found, strict=True))]
    means = [statistics.mean(row) for row in found]
    return [mean_sd(column, digits=1) for column in [*columns, means]]


def _rate(each: Sequence[dict[str, Any]], name: str) -> str:
    rate = next(r["train.learning_rate"] for r in each if r["domain"] == name)
    return f"{rate:g}"


def _cut(rows: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.mean(row['cut'] for row in rows):.0%}" if rows else "–"


def _draw(found: Any, domains: list[str], rules: list[str], path: Path) -> None:
    figure, (left, right) = panels(
        ["Test accuracy, %, by adapter and domain", "Mean over the four domains"], 4.6
    )
    rows = [*domains, "all"]
    values = [
        [statistics.mean(column) for column in zip(*found[name], strict=True)]
        for name in rows
    ]
    left.imshow(values, cmap="Blues", vmin=50, vmax=95, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = "white" if value > 78 else "black"
            left.text(x, y, f"{value:.1f}", ha="center", va="center", color=color)
    left.set_xticks(range(len(domains)), domains)
    left.set_yticks(range(len(rows)), rows)
    left.set(xlabel="tested on", ylabel="trained on")
    left.grid(visible=False)
    names = [OWN, "all", *rules]
    for y, name in enumerate(reversed(names)):
        means = [statistics.mean(row) for row in found[name]]
        color = "C1" if name in rules else "C0"
        right.plot(means, [y] * len(means), "o", color=color, alpha=0.5)
        right.plot([statistics.mean(means)], [y], "|", color=color, ms=18, mew=2.5)
    right.set_yticks(range(len(names)), [NAMES[name] for name in reversed(names)])
    right.set_ylim(-0.6, len(names) - 0.4)
    right.set_xlabel("test accuracy, %  (dots: seeds, bar: mean)")
    save(figure, path)
