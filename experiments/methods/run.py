"""Does any method beat plain LoRA once the learning rate of each is tuned?

python -m experiments.methods.run            # everything that is missing
python -m experiments.methods.run --report   # tables and plot only
python -m experiments.methods.run --quick    # a try, in runs/
"""

import argparse
from pathlib import Path
from typing import Any

from experiments.methods.report import report
from experiments.short import ALPHA, QUICK, Runs, Size, Task, best

# A contender is what it changes of the config, by section.
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"lora": {"rslora": True}},
    "LoRA+": {"train": {"lora_b_ratio": 16.0}},
    "orthogonal": {"lora": {"init": "orthogonal"}},
    "DoRA": {"lora": {"dora": True}},
}
RANK = 8
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
TUNING_SEED, SEEDS = 0, [1, 2, 3]
RATE = "train.learning_rate"
RESULTS = Path(__file__).parent / "results"


def train(task: Task, runs: Runs) -> None:
    """Tunes each contender's learning rate, then trains it with fresh seeds."""
    test = {"test": str(task.files["movie"]["test"])}
    for name, changes in CONTENDERS.items():
        lora = {"rank": RANK, "alpha": ALPHA, **changes.get("lora", {})}
        sections = {**changes, "lora": lora}
        grid: dict[str, Any] = {RATE: RATES, "train.seed": [TUNING_SEED]}
        together = len(SEEDS)
        config = task.config(**sections)
        rows = runs.sweep(f"{name}, tuning", config, grid, together=together)
        (rate,) = best(rows, RATE)
        grid = {RATE: [rate], "train.seed": SEEDS}
        config = task.config(**sections, data=test)
        runs.sweep(f"{name}, seeds", config, grid, together=together)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="tables and plot only")
    parser.add_argument("--quick", action="store_true", help="tiny, in runs/")
    args = parser.parse_args(argv)
    work = Path("runs/methods-quick" if args.quick else "runs/methods")
    results = work / "results" if args.quick else RESULTS
    runs = Runs(results, work)
    if not args.report:
        train(Task(QUICK if args.quick else Size()), runs)
    report(runs, results)


if __name__ == "__main__":
    main()
