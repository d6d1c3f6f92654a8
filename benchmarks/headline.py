"""The README's table of speed: a decoder's step on a CPU, a GPU and a TPU."""

import json
from typing import Any

from benchmarks import compiled, contenders
from benchmarks.harness import RESULTS

PAGE = RESULTS / "headline.md"
RIVALS = {  # by column: their name in the results files
    "plain autodiff": compiled.PLAIN,
    "nnx.LoRA": compiled.NNX,
    "qwix": compiled.QWIX,
    "PEFT compiled": "PEFT on torch, compiled",
}
SOURCES = {  # by device: a results file, whose first row with such a time is taken
    "{cores} CPU cores, measured {date}": ("contenders-cpu", "median_ms"),
    "one H100, measured {date}": ("contenders-gpu", "median_ms"),
    "H100, compiler's estimate": ("compiled", "microseconds"),
    "TPU v5e, compiler's estimate": ("compiled", "cycles"),
}


def main() -> None:
    """Writes the table beside the results files."""
    lines = [
        f"| time (temporaries), lora_jax / it | {' | '.join(RIVALS)} |",
        f"|---|{'---|' * len(RIVALS)}",
    ]
    for title, (name, time) in SOURCES.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        cores = record["machine"].split(", ")[-1].split()[0]
        row = next(row for row in record["rows"] if time in row[contenders.OURS])
        cells = [
            _ratios(row[contenders.OURS], row.get(it), time) for it in RIVALS.values()
        ]
        device = title.format(cores=cores, date=record["date"])
        lines.append(f"| {device} | {' | '.join(cells)} |")
    PAGE.write_text("\n".join(lines) + "\n")


def _ratios(ours: dict[str, Any], it: dict[str, Any] | None, time: str) -> str:
    if it is None:
        return "–"
    text = f"{ours[time] / it[time]:.2f}"
    if not it["temp_bytes"]:
        return text
    return f"{text} ({ours['temp_bytes'] / it['temp_bytes']:.2f})"
