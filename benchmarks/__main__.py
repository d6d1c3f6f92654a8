"""Lists, runs and reports the benchmarks: ``python -m benchmarks``."""

import argparse
import importlib
import json

from benchmarks import harness

COMPARISONS = ("lora_vs_full",)


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*COMPARISONS, "report", []])
    parser.add_argument("--quick", action="store_true", help="fewer samples and shapes")
    args = parser.parse_args()
    if not args.names:
        for name in COMPARISONS:
            module = importlib.import_module(f"benchmarks.{name}")
            print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        print("report: the tables of benchmarks/results/")
    for name in args.names:
        if name == "report":
            report()
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.main(args.quick)
        command = f"python -m benchmarks {name}" + " --quick" * args.quick
        path = harness.save(name, rows, command)
        print(module.table(rows))
        print(f"written to {path}")


def report() -> None:
    """Prints every results file as its comparison's table."""
    for path in sorted(harness.RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        module = importlib.import_module(f"benchmarks.{record['comparison']}")
        print(f"### {record['comparison']} ({record['machine']}, {record['date']})\n")
        print(f"`{record['command']}`, commit {record['commit']}\n")
        print(module.table(record["rows"]) + "\n")


if __name__ == "__main__":
    main()
