"""The tables and the plot of `run.py`, from the recorded runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.drawing import curve, panels, save, table
from experiments.recorded import Runs
from experiments.short import mean_sd

KINDS = ("query", "key", "value", "attention/output", "mlp/up", "mlp/down", "word")


def report(runs: Runs, results: Path) -> None:
    """Writes ``spectrum.md``, ``table.md`` and ``low_rank.png``.

    Args:
      runs: the recorded runs.
      results: the folder to write to.
    """
    spectra, scores = _all(runs, "spectra"), _all(runs, "extractions")
    ranks = sorted({s["rank"] for s in scores if s["rank"]})
    rows = []
    for kind in KINDS:
        found = [row for row in spectra if f"/{kind}/" in row["layer"]]
        rows.append([kind, _shape(found[0]), *_spectrum(found), _size(found)])
    noise = [row for row in spectra if row["layer"] == "random"]
    rows += [["random", _shape(row), *_spectrum([row]), "–"] for row in noise]
    head = ["kernel", "shape", "50 %", "90 %", "99 %", "stable rank", "size / W0"]
    (results / "spectrum.md").write_text(table(head, rows))
    print(table(head, rows))

    linears = [s for s in spectra if s["layer"].startswith("encoder/layer_")]
    shapes = [s["shape"] for s in linears]
    noise = [s for s in noise if s["shape"] in shapes]
    kept = {k: [row["kept"][i] for row in linears] for i, k in enumerate(ranks)}
    random = {k: [row["kept"][i] for row in noise] for i, k in enumerate(ranks)}
    rows = []
    for rank in [0, *ranks, None]:
        row = ["the fine-tuned model" if rank is None else rank]
        for shares in (kept, random):
            given = rank in shares and shares[rank]
            row.append(f"{100 * statistics.mean(given):.0f}" if given else "–")
        for around in ("tuned", "base"):
            found = _accuracy(scores, around, rank)
            row.append(mean_sd(found, digits=1) if found else "–")
        rows.append(row)
    head = [
        "rank",
        "energy kept, %",
        "of a random matrix, %",
        "accuracy, %, the rest fine-tuned",
        "accuracy, %, the rest the base's",
    ]
    (results / "table.md").write_text(table(head, rows))
    print(table(head, rows))
    _draw(spectra, scores, ranks, kept, random, results / "low_rank.png")


def _all(runs: Runs, part: str) -> list[dict[str, Any]]:
    seeds = range(100)
    return [row for seed in seeds for row in runs.of(f"{part} {seed}")]


def _shape(row: dict[str, Any]) -> str:
    return " × ".join(map(str, row["shape"]))


def _spectrum(rows: Sequence[dict[str, Any]]) -> list[str]:
    needed = zip(*(row["ranks"] for row in rows), strict=True)
    found = [f"{statistics.median(ranks):.0f}" for ranks in needed]
    return [*found, f"{statistics.median(row['stable_rank'] for row in rows):.1f}"]


def _size(rows: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.mean(row['relative'] for row in rows):.1%}"


def _accuracy(
    scores: Sequence[dict[str, Any]], around: str, rank: int | None
) -> list[float]:
    rows = [s for s in scores if s["around"] == around and s["rank"] == rank]
    return [100 * row["accuracy"] for row in rows]


def _draw(
    spectra: Any, scores: Any, ranks: list[int], kept: Any, random: Any, path: Path
) -> None:
    figure, (left, right) = panels(
        ["Energy of ΔW in its largest singular values", "The extracted adapter"]
    )
    curve(left, {k: [100 * x for x in v] for k, v in kept.items()}, "linears", "C0")
    word = [s for s in spectra if "/word/" in s["layer"]]
    points = {k: [100 * s["kept"][i] for s in word] for i, k in enumerate(ranks)}
    curve(left, points, "word embedding", "C2")
    points = {k: [100 * x for x in v] for k, v in random.items()}
    curve(left, points, "random matrices", "0.5", linestyle="--")
    left.set_xlabel("rank k")
    left.set_ylabel("energy kept, %  (dots: layers and seeds)")
    for around, color in (("tuned", "C0"), ("base", "C1")):
        points = {k: x for k in ranks if (x := _accuracy(scores, around, k))}
        rest = "fine-tuned" if around == "tuned" else "the base's"
        style = {} if around == "tuned" else {"ls": "none", "marker": "_", "ms": 14}
        curve(right, points, f"linears at rank k, the rest {rest}", color, **style)
    for around, rank, color, label in (
        ("tuned", None, "0.3", "the fine-tuned model"),
        ("tuned", 0, "C0", "rank 0, the rest fine-tuned"),
    ):
        value = statistics.mean(_accuracy(scores, around, rank))
        right.axhline(value, color=color, ls=":", lw=1.5, label=label)
    right.set_xlabel("rank k")
    right.set_ylabel("test accuracy, %  (dots: seeds)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, map(str, ranks))
    left.legend(fontsize=8, frameon=False, loc="lower right")
    right.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
    save(figure, path)
