"""`python -m tests.fuzz --minutes 60`: a long run, or one of its inputs again."""

import argparse
import tempfile
from pathlib import Path

from tests.fuzz.runner import make_input, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Runs the fuzzer and prints README.md's table; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a reader, such as yaml")
    parser.add_argument("--again", metavar="NUMBER", type=int, help="just this input")
    args = parser.parse_args()
    targets = [t for t in TARGETS if not args.only or t.name in args.only]
    if args.again is not None:
        for target in targets:
            folder = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
            make_input(target, args.seed, args.again, folder)
            print(f"{target.name}: {folder}")
            target.read(folder)
        return 0
    report = run(args.seed, seconds=60 * args.minutes, targets=targets)
    print("| reader | inputs | refused | slowest (s) |\n|---|---|---|---|")
    for name in sorted(report.counts):
        count, refused = report.counts[name], report.refused[name]
        print(f"| {name} | {count:,} | {refused:,} | {report.slowest[name]:.2f} |")
    total, refused = report.counts.total(), report.refused.total()
    print(f"| all | {total:,} | {refused:,} | {max(report.slowest.values()):.2f} |")
    print(f"{len(report.findings)} findings")
    return int(bool(report.findings))


if __name__ == "__main__":
    raise SystemExit(main())
