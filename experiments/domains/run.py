"""Four domains, four adapters over one base: each on each, merged, or one for all.

python -m experiments.domains.run            # everything that is missing
python -m experiments.domains.run --report   # tables and plot only
python -m experiments.domains.run --quick    # a try, in runs/
"""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.domains.report import report
from experiments.recorded import Runs, run_short
from experiments.short import HEAD, QUICK, Params, Size, Task, best, write_rows
from lora_jax import LoRAConfig, adapt, combine_adapters, load_adapter

DOMAINS = ("movie", "amazon", "nyt", "tweets")
ALL = "all"
SIZE = Size(train=480, validation=160, test=300, tokens=(9, 24))
RATES = [1e-3, 3e-3, 1e-2]
SEEDS = [0, 1, 2]
RANK = 8
RULES: dict[str, dict[str, Any]] = {  # of combine_adapters
    "cat": {"method": "cat"},
    "svd": {"method": "svd", "rank": RANK},
    "ties": {"method": "ties", "rank": 4 * RANK},
    "dare": {"method": "dare", "rank": 4 * RANK},
    "dare_ties": {"method": "dare_ties", "rank": 4 * RANK},
}
# Of the sum: 0.25 is the mean ("linear").
WEIGHTS = (0.25, 0.5, 1.0, 2.0)
RATE, SEED = "train.learning_rate", "train.seed"
RESULTS = Path(__file__).parent / "results"


class Domains(Task):
    """The four domains, and files of all of them together."""

    def __init__(self, size: Size) -> None:
        super().__init__(size, DOMAINS)
        splits = ("train", "validation")
        self.files[ALL] = {
            split: write_rows(ALL + "-" + split, self.together(split))
            for split in splits
        }
        self.scored = {
            split: {name: self.batches(self.files[name][split]) for name in DOMAINS}
            for split in ("validation", "test")
        }

    def together(self, split: str) -> list[dict[str, Any]]:
        """Returns the sentences of all domains, which the run shuffles."""
        files = [self.files[name][split] for name in DOMAINS]
        return [json.loads(x) for f in files for x in f.read_text().splitlines()]

    def on_each(self, params: Params, split: str) -> dict[str, dict[str, float]]:
        """Scores a model on each domain."""
        found = self.scored[split]
        return {name: self.score(params, batches) for name, batches in found.items()}


def train(task: Domains, runs: Runs) -> list[dict[str, Any]]:
    """Tunes each adapter's learning rate at the first seed, then trains all seeds."""
    files = {name: str(task.files[name]["train"]) for name in (*DOMAINS, ALL)}
    names = {Path(file).name: name for name, file in files.items()}
    config = task.config(ALL, lora={"rank": RANK})

    def score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the loss on the adapter's own domain."""
        for row in rows:
            row["domain"] = name = names[row["data.train"]]
            scores = task.on_each(task.merged(row["folder"]), "validation")
            own = DOMAINS if name == ALL else [name]
            row["own_loss"] = float(np.mean([scores[d]["loss"] for d in own]))
            del row["data.train"]
        return rows

    grid: dict[str, Any] = {"data.train": [*files.values()], RATE: RATES}
    grid[SEED] = SEEDS[:1]
    swept = runs.sweep("sweep", config, grid, together=len(RATES))
    tuned = runs.once("tuned", lambda: score(swept))
    rates = {
        name: best([r for r in tuned if r["domain"] == name], RATE, "own_loss")[0]
        for name in files
    }
    rows = [(name, seed) for name in files for seed in SEEDS[1:]]
    grid = {
        "data.train": [files[name] for name, _ in rows],
        RATE: [rates[name] for name, _ in rows],
        SEED: [seed for _, seed in rows],
    }
    swept = runs.sweep("seeds", config, grid, zipped=True, together=2)
    more = runs.once("more", lambda: score(swept))
    first = [r for r in tuned if r[RATE] == rates[r["domain"]]]
    return [*({**r, SEED: SEEDS[0]} for r in first), *more]


def each_on_each(
    task: Domains, runs: Runs, trained: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Scores every trained adapter on every domain's test sentences."""

    def make() -> list[dict[str, Any]]:
        rows = []
        for run in trained:
            scores = task.on_each(task.merged(run["folder"]), "test")
            setting = {"domain": run["domain"], RATE: run[RATE], "seed": run[SEED]}
            for name, found in scores.items():
                rows.append({**setting, "on": name, **found})
        return rows

    return runs.once("each", make)


class Merger:
    """Merges the four domains' adapters of one seed.

    The heads are averaged: all four started as the same head.
    """

    def __init__(self, task: Domains, folders: dict[str, str]) -> None:
        self.task = task
        self.found = [load_adapter(Path(folders[d]) / "adapter") for d in DOMAINS]
        loaded = task.loaded
        adapted = adapt(loaded.module, self.found[0].config, *loaded.inputs)
        self.targets = adapted.targets(loaded.params)
        heads = [one.variables["params"][HEAD] for one in self.found]
        self.head = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *heads)

    def merge(self, options: dict[str, Any]) -> tuple[Any, float]:
        """Returns the merged adapter at weights of 1, and the mean share cut off."""
        combined = combine_adapters(
            [(one.variables["lora"], self.targets) for one in self.found],
            [1.0] * len(self.found),
            **options,
        )
        return combined, float(np.mean([*combined.errors.values()]))

    def params(self, combined: Any, weight: float) -> Params:
        """Returns the model with the merged adapter times a weight."""
        ranks = {t.path: combined.config.rank_for(t.path) for t in self.targets}
        alphas = {path: weight * rank for path, rank in ranks.items()}
        config = LoRAConfig.for_layers(ranks, alphas, train=[HEAD])
        variables = {"lora": combined.lora, "params": {HEAD: self.head}}
        return self.task.with_adapter(config, variables)


def merge(
    task: Domains, runs: Runs, trained: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Merges by each rule; the weight is chosen on validation at the first seed."""
    folders: dict[int, dict[str, str]] = {seed: {} for seed in SEEDS}
    for run in trained:
        folders[run[SEED]][run["domain"]] = run["folder"]

    def weigh() -> list[dict[str, Any]]:
        merger, rows = Merger(task, folders[SEEDS[0]]), []
        for rule, options in RULES.items():
            combined, _ = merger.merge(options)
            for weight in WEIGHTS:
                scores = task.on_each(merger.params(combined, weight), "validation")
                loss = float(np.mean([found["loss"] for found in scores.values()]))
                rows.append({"rule": rule, "weight": weight, "loss": loss})
        return rows

    weighed = runs.once("weights", weigh)

    def make() -> list[dict[str, Any]]:
        rows = []
        for seed, (rule, options) in itertools.product(SEEDS, RULES.items()):
            merger = Merger(task, folders[seed])
            combined, cut = merger.merge(options)
            (weight,) = best([w for w in weighed if w["rule"] == rule], "weight")
            scores = task.on_each(merger.params(combined, weight), "test")
            for name, found in scores.items():
                setting = {"rule": rule, "weight": weight, "seed": seed, "cut": cut}
                rows.append({**setting, "on": name, **found})
        return rows

    return runs.once("merged", make)


def train_and_merge(task: Domains, runs: Runs) -> None:
    """Runs what is missing."""
    trained = train(task, runs)
    each_on_each(task, runs, trained)
    merge(task, runs, trained)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, then the report."""

    def task(quick: bool) -> Domains:
        return Domains(QUICK if quick else SIZE)

    run_short(__doc__, RESULTS, task, train_and_merge, report, argv)


if __name__ == "__main__":
    main()
