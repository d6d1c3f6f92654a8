"""Lists, runs and reports the benchmarks: ``python -m benchmarks``."""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

# By default JAX preallocates most of a GPU's memory, leaving none for torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from lora_jax.cli import huge_pages

if __name__ == "__main__":  # as `lora-jax` does; before importing JAX and torch
    huge_pages.enable()

from benchmarks import compare, harness, report

COMPARISONS = (
    "contenders",
    "lengths",
    "long_rows",
    "overhead",
    "generation",
    "input",
    "startup",
    "huge_pages",
    "cpu_ideas",
    "lora_vs_full",
    "loading",
    "perplexity",
    "slices",
    "sweep",
    "sweep_compiled",
    "bank",
    "plan_peak",
    "bfloat16",
    "compiled",
)
QUICK = ("contenders", "overhead")


def main() -> None:
    """Runs the comparisons named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="comparisons to run, or 'report'")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer samples and shapes, in a separate results file; without names: "
        f"{' and '.join(QUICK)}",
    )
    parser.add_argument(
        "--target",
        action="append",
        help="of 'compiled' and 'slices': a TPU slice or GPU to compile for, like "
        "v5e:2x2; may be repeated",
    )
    parser.add_argument(
        "--known",
        action="store_true",
        help="of 'compiled': compile nothing, report what earlier runs compiled",
    )
    args = parser.parse_args()
    if args.names[:1] == ["compare"]:
        if len(args.names) != 3:
            parser.error("compare takes two results files: compare OLD.json NEW.json")
        sys.exit(not compare.main(*map(Path, args.names[1:])))
    if unknown := sorted(set(args.names) - {*COMPARISONS, "report"}):
        parser.error(f"unknown benchmark {unknown}; use {COMPARISONS} or 'report'")
    if args.target and args.names not in (["compiled"], ["slices"]):
        parser.error("--target is an option of 'compiled' and 'slices' alone")
    if args.known and args.names != ["compiled"]:
        parser.error("--known is an option of 'compiled' alone")
    names = args.names or (QUICK if args.quick else ())
    if not names:
        for name in COMPARISONS:
            module = importlib.import_module(f"benchmarks.{name}")
            print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        print("report: make tables and plots from benchmarks/results/")
        print("compare OLD.json NEW.json: compare two results files for regressions")
    for name in names:
        if name == "report":
            report.main()
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        options: dict[str, Any] = {"targets": args.target} if args.target else {}
        if args.known:
            options["known"] = True
        rows = module.main(args.quick, **options)
        path = harness.save(name, rows, args.quick)
        print(module.table(rows))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
