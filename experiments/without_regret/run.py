"""Does what "LoRA Without Regret" reports hold on a small encoder and a small task?

python -m experiments.without_regret.run            # everything that is missing
python -m experiments.without_regret.run --report   # tables and plot only
python -m experiments.without_regret.run --quick    # a try, in runs/
"""

import itertools
from pathlib import Path
from typing import Any

from experiments.full import FullTraining
from experiments.recorded import Runs, run_short
from experiments.short import ALPHA, QUICK, Size, Task
from experiments.without_regret.report import report

RATES = {  # a decade apart
    "full": [1e-4, 3e-4, 1e-3],
    "lora": [1e-3, 3e-3, 1e-2],
}
SEEDS = [0, 1, 2]
RANKS = [1, 32]
ATTENTION = ["query", "key", "value", "output"]
ATTENTION_RANK = 72  # trains as many parameters as rank 32 on all linears
LARGE_BATCH = 64
TOGETHER = 9
RESULTS = Path(__file__).parent / "results"


def train_full(task: Task, runs: Runs, name: str, batch_size: int) -> None:
    """Records full fine-tuning at every rate and seed."""

    def make() -> list[dict[str, Any]]:
        rows = []
        file = task.files["movie"]["train"]
        training = FullTraining(task, file, batch_size=batch_size)
        validation = task.batches(task.files["movie"]["validation"])
        for rate, seed in itertools.product(RATES["full"], SEEDS):
            scores = task.score(training.run(rate, seed), validation)
            rows.append({"train.learning_rate": rate, "train.seed": seed, **scores})
        return rows

    runs.once(name, make)


def train(task: Task, runs: Runs) -> None:
    """Runs what is missing."""
    grid: dict[str, Any] = {
        "train.learning_rate": RATES["lora"],
        "train.seed": SEEDS,
    }
    ranks = {"lora.rank": RANKS, **grid}
    train_full(task, runs, "full", 16)
    runs.sweep("ranks", task.config(), ranks, together=TOGETHER)
    lora = {"rank": ATTENTION_RANK, "alpha": ALPHA, "targets": ATTENTION}
    runs.sweep("attention", task.config(lora=lora), grid, together=TOGETHER)
    lora = {"rank": RANKS[-1], "alpha": ALPHA}
    config = task.config(lora=lora, train={"batch_size": LARGE_BATCH})
    runs.sweep("large batch", config, grid, together=TOGETHER)
    train_full(task, runs, "full, large batch", LARGE_BATCH)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, then the report."""

    def task(quick: bool) -> Task:
        return Task(QUICK if quick else Size())

    run_short(__doc__, RESULTS, task, train, report, argv)


if __name__ == "__main__":
    main()
