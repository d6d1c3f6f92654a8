"""The same question for a language model: SmolLM2-135M describes E2E's tables.

A run takes two minutes on two cores, so each method's learning rate is searched for:
three rates, half a decade apart, then further ones until the best lies between two.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

from experiments import fetch
from experiments.e2e.run import read_tables
from experiments.recorded import Runs
from experiments.short import best, write_rows

# A contender: what it changes of the config, and the middle of its first three rates.
CONTENDERS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({}, 3e-3),
    "DoRA": ({"lora": {"dora": True}}, 3e-3),
    "LoRA+": ({"train": {"lora_b_ratio": 16.0}}, 1e-3),
    "PiSSA": ({"lora": {"init": "pissa"}}, 1e-3),
}
RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
TUNING_SEED, SEEDS = 0, [1, 2, 3]
RATE = "train.learning_rate"


class Size(NamedTuple):
    """Tables in each split, with one sentence each."""

    train: int = 256
    validation: int = 64
    test: int = 128


QUICK = Size(16, 4, 4)


def write_tables(size: Size) -> dict[str, Path]:
    """Writes disjoint splits of E2E's tables as JSONL, shuffled with seed 0.

    Args:
      size: tables in each split; those of the test are E2E's own test tables.

    Returns:
      Paths by split.
    """
    rng = random.Random(0)
    tables = {split: read_tables(split) for split in ("valid", "test")}
    for found in tables.values():
        rng.shuffle(found)
    last = size.validation + size.train
    splits = {
        "train": tables["valid"][size.validation : last],
        "validation": tables["valid"][: size.validation],
        "test": tables["test"][: size.test],
    }
    return {
        split: write_rows(
            f"e2e-{split}",
            [
                {"prompt": f"{slots}\n", "completion": rng.choice(sentences)}
                for slots, sentences in rows
            ],
        )
        for split, rows in splits.items()
    }


def train(runs: Runs, *, quick: bool = False) -> None:
    """Tunes each contender's learning rate, then trains it with fresh seeds.

    Args:
      runs: records them.
      quick: with a few tables only.
    """
    files = {k: str(v) for k, v in write_tables(QUICK if quick else Size()).items()}
    test = files.pop("test")
    for name, (changes, middle) in CONTENDERS.items():
        config: dict[str, Any] = {
            "model": {"path": str(fetch.smollm2())},
            "data": files,
            "lora": {"rank": 8, "alpha": 16, **changes.get("lora", {})},
            "train": {
                "batch_size": 8,
                "eval_every": 1_000_000,
                "keep": 1,
                "baseline": False,
                **changes.get("train", {}),
            },
        }
        rate = tune(runs, name, config, RATES.index(middle))
        config = {**config, "data": {**files, "test": test}}
        grid = {RATE: [rate], "train.seed": SEEDS}
        runs.alone(f"{name}, seeds", config, grid)


def tune(runs: Runs, name: str, config: dict[str, Any], middle: int) -> float:
    """Returns the learning rate whose neighbours both have a higher validation loss.

    Args:
      runs: records the runs.
      name: of the contender.
      config: of all its runs.
      middle: index in `RATES` of the rate to start around.

    Returns:
      The rate; one of the ends of `RATES` if the loss falls up to there.
    """
    low, high = middle - 1, middle + 1
    tried = list(range(low, high + 1))
    rows = []
    while tried:
        for index in tried:
            grid = {RATE: [RATES[index]], "train.seed": [TUNING_SEED]}
            rows += runs.alone(f"{name}, {RATES[index]:g}", config, grid)
        (rate,) = best(rows, RATE)
        tried = []
        if rate == RATES[low] and low > 0:
            tried = [low := low - 1]
        elif rate == RATES[high] and high < len(RATES) - 1:
            tried = [high := high + 1]
    return rate


def tuning(runs: Runs, name: str) -> list[dict[str, Any]]:
    """Returns the recorded runs of a contender's search, by rate."""
    return [row for rate in RATES for row in runs.of(f"{name}, {rate:g}")]
