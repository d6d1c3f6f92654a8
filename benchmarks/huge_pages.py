"""A training step with 2 MiB memory pages against 4 KiB pages (Linux).

``lora-jax`` and these benchmarks enable huge pages (`lora_jax.cli.huge_pages`). glibc
reads the setting at process start, so this alternates between processes.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
from typing import Any

from benchmarks import contenders, specs, torch_peft
from benchmarks.contenders import OURS
from benchmarks.harness import Contender, alternate, is_on_cpu, summary
from benchmarks.rivals import RATE
from lora_jax.cli.huge_pages import HUGETLB, TUNABLES

PAGES = {"4 KiB": 0, "2 MiB": 1}
CALLS = 5  # per contender and process
PEFT = "PEFT on torch, eager"


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs both encoders.

    Args:
      quick: only the first one, with fewer processes.

    Returns:
      One row per contender and model.
    """
    if sys.platform != "linux" or not is_on_cpu():
        raise SystemExit("huge_pages: this comparison needs a CPU and Linux.")
    rows = []
    for number, spec in enumerate(specs.ENCODERS[: 1 if quick else None]):
        runs: dict[str, list[dict[str, Any]]] = {size: [] for size in PAGES}
        for _ in range(1 if quick else 2):
            for size, hugetlb in PAGES.items():
                runs[size].append(_process(number, hugetlb))
        rows += [
            {
                "shape": spec.name,
                "contender": name,
                **{size: _joined([run[name] for run in runs[size]]) for size in PAGES},
            }
            for name in runs["4 KiB"][0]
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| a step of | with | 4 KiB: ms, faults | 2 MiB: ms, faults | time, 2 MiB / "
        "4 KiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [
            f"{row[size]['median_ms']:.0f} ({row[size]['quartiles_ms'][0]:.0f}–"
            f"{row[size]['quartiles_ms'][1]:.0f}), {row[size]['faults']:,.0f}"
            for size in PAGES
        ]
        ratio = row["2 MiB"]["median_ms"] / row["4 KiB"]["median_ms"]
        cells = (row["shape"], row["contender"], *shown, f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _process(number: int, hugetlb: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.huge_pages", str(number)],
        env={**os.environ, TUNABLES: f"{HUGETLB}={hugetlb}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins a contender's samples and page faults per step over its processes."""
    faults = sum(run["faults"] for run in runs) / len(runs)
    return {**summary([ms for run in runs for ms in run["ms"]]), "faults": faults}


def _timed(name: str, contender: Contender) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ms = alternate({name: contender}, CALLS)[name]["ms"]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"ms": ms, "faults": faults / CALLS}


def _print_one(number: int) -> None:
    """Times our step and PEFT's, one after the other, in this process."""
    spec = specs.ENCODERS[number]
    task, ids, labels = contenders.encoder_task(spec)
    ours = contenders.own(task, exclude=["classifier"])[OURS]
    found = {OURS: _timed(OURS, ours())}
    if importlib.util.find_spec("peft"):
        torch = torch_peft.bert(spec, ids, labels)
        peft = torch_peft.contender(*torch, lora=contenders.PEFT_LORA, rate=RATE)
        found[PEFT] = _timed(PEFT, peft)
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times one encoder; prints it.")
    parser.add_argument("number", type=int)
    _print_one(parser.parse_args().number)
