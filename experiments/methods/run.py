"""Does any method beat plain LoRA once the learning rate of each is tuned?

python -m experiments.methods.run            # everything that is missing
python -m experiments.methods.run --report   # tables and plot only
python -m experiments.methods.run --quick    # a try, in runs/
"""

import functools
from pathlib import Path
from typing import Any

from experiments.methods import language
from experiments.methods.report import report
from experiments.recorded import Runs, run_short
from experiments.short import ALPHA, HEAD, QUICK, Size, Task, best
from lora_jax import LoRAConfig, find_targets

# A contender is what it changes of the config, by section.
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"lora": {"rslora": True}},
    "LoRA+": {"train": {"lora_b_ratio": 16.0}},
    "orthogonal": {"lora": {"init": "orthogonal"}},
    "DoRA": {"lora": {"dora": True}},
    "VeRA": {"lora": {"vera": True, "rank": 256, "alpha": 256.0}},
    "PiSSA": {"lora": {"init": "pissa"}},
    "LoRA-FA": {"lora": {"lora_fa": True, "rank": 16, "alpha": 64.0}},
    "EVA": {"lora": {"init": "eva"}},
    "OLoRA": {"lora": {"init": "olora"}},
    "LoRA-GA": {"lora": {"init": "lora_ga"}},
}
RANK = 8
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
ALONE_RATES = RATES[:3]  # of those that a sweep doesn't take
OTHER_RATES = {"VeRA": [1e-2, 3e-2, 1e-1]}  # two vectors, not matrices
TUNING_SEED, SEEDS = 0, [1, 2, 3]
RATE = "train.learning_rate"
RESULTS = Path(__file__).parent / "results"


def train(task: Task, runs: Runs) -> None:
    """Tunes each contender's learning rate, then trains it with fresh seeds."""
    test = {"test": str(task.files["movie"]["test"])}
    for name, changes in CONTENDERS.items():
        lora = {"rank": RANK, "alpha": ALPHA, **changes.get("lora", {})}
        sections = {**changes, "lora": lora}
        options: Any = {"together": len(SEEDS)}
        record = functools.partial(runs.sweep, **options)
        rates = RATES
        if not is_swept(LoRAConfig(**lora)):
            record, rates = runs.alone, OTHER_RATES.get(name, ALONE_RATES)
        grid: dict[str, Any] = {RATE: rates, "train.seed": [TUNING_SEED]}
        rows = record(f"{name}, tuning", task.config(**sections), grid)
        (rate,) = best(rows, RATE)
        grid = {RATE: [rate], "train.seed": SEEDS}
        config = task.config(**sections, data=test)
        record(f"{name}, seeds", config, grid)
    runs.once("parameters", lambda: parameters(task))
    language.train(runs.part("language"), quick=task.size == QUICK)


def is_swept(config: LoRAConfig) -> bool:
    """Returns whether a method's runs are trained side by side, in a sweep."""
    return not config.fixes_leaves and config.init != "eva"


def parameters(task: Task) -> list[dict[str, Any]]:
    """Counts what each contender trains, without the head."""
    model, rows = task.loaded, []
    for name, changes in CONTENDERS.items():
        fields = {"rank": RANK, "alpha": ALPHA, "exclude": [HEAD]}
        config = LoRAConfig(**(fields | changes.get("lora", {})))
        found = find_targets(model.module, config, *model.inputs, params=model.params)
        rows.append({"method": name, "trained": sum(t.trainable for t in found)})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, then the report."""

    def task(quick: bool) -> Task:
        return Task(QUICK if quick else Size())

    run_short(__doc__, RESULTS, task, train, report, argv)


if __name__ == "__main__":
    main()
