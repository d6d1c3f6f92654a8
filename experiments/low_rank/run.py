"""Is a real full fine-tuning's change of the weights low-rank?

python -m experiments.low_rank.run            # everything that is missing
python -m experiments.low_rank.run --report   # tables and plot only
python -m experiments.low_rank.run --quick    # a try, in runs/
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.full import FullTraining
from experiments.low_rank.report import report
from experiments.recorded import Runs, run_short
from experiments.short import HEAD, QUICK, Params, Size, Task, best
from lora_jax import (
    LoRAConfig,
    Target,
    extract_adapter,
    find_targets,
    merge_params,
)
from lora_jax.tree.paths import flatten, unflatten

SIZE = Size(top=None)
RATES = [1e-4, 3e-4, 1e-3]
SEEDS = [0, 1, 2]
RANKS = [1, 2, 4, 8, 16, 64, 384]  # the last is the kernels' full rank
WORD = "encoder/embeddings/word/embedding"
BASE_RANKS = [8, 384]
SHARES = (0.5, 0.9, 0.99)
RESULTS = Path(__file__).parent / "results"


def targets_of(task: Task, config: LoRAConfig) -> list[Target]:
    """Returns the layers that a config adapts."""
    return find_targets(
        task.loaded.module, config, *task.loaded.inputs, params=task.loaded.params
    )


def linears(task: Task, rank: int) -> list[Target]:
    """Returns the layers that `lora-jax extract` finds, without the head."""
    return targets_of(task, LoRAConfig(rank=rank, exclude=[HEAD]))


def spectrum(delta: np.ndarray) -> dict[str, Any]:
    """Describes a matrix by its singular values.

    Args:
      delta: ``[i, o]``.

    Returns:
      ``kept``: the share of ``‖ΔW‖²`` in the largest k singular values, for k in
      `RANKS`; ``ranks``: how many hold each of `SHARES`; the stable rank
      ``‖ΔW‖² / σ₁²``.
    """
    energy = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    share = np.cumsum(energy) / energy.sum()
    return {
        "kept": [round(float(share[min(k, len(share)) - 1]), 5) for k in RANKS],
        "ranks": [int(np.searchsorted(share, x - 1e-12)) + 1 for x in SHARES],
        "stable_rank": round(float(energy.sum() / energy[0]), 3),
    }


def spectra(task: Task, tuned: Params, seed: int) -> list[dict[str, Any]]:
    """Describes every kernel's change, and a random matrix of each shape."""
    before, after = flatten(task.loaded.params), flatten(tuned)
    rows, rng, shapes = [], np.random.default_rng(seed), set()
    paths = [target.weight_path for target in linears(task, 1)]
    for path in [*paths, WORD]:
        old = np.asarray(before[path])
        delta = np.asarray(after[path]) - old
        if path == WORD:  # words that occur
            changed = np.abs(delta).max(axis=1) > 0
            delta, old = delta[changed], old[changed]
        size = float(np.linalg.norm(delta) / np.linalg.norm(old))
        row = {"seed": seed, "layer": path, "shape": delta.shape}
        rows.append({**row, "relative": round(size, 5), **spectrum(delta)})
        shapes.add(delta.shape)
    for shape in sorted(shapes) if seed == SEEDS[0] else ():
        noise = spectrum(rng.standard_normal(shape))
        rows.append({"seed": seed, "layer": "random", "shape": shape, **noise})
    return rows


def extractions(task: Task, tuned: Params, seed: int) -> list[dict[str, Any]]:
    """Scores the extracted adapters of every rank on the test sentences.

    Everything but the linears' kernels is the tuned model's (``around`` is "tuned"), or
    the base's but for the head ("base").
    """
    test = task.batches(task.files["movie"]["test"])
    base = {**task.loaded.params, HEAD: tuned[HEAD]}
    kernels = flatten(task.loaded.params)
    own = {row.weight_path: kernels[row.weight_path] for row in linears(task, 1)}
    arounds = {"tuned": unflatten({**flatten(tuned), **own}), "base": base}
    rows = []

    def add(around: str, rank: int | None, params: Params) -> None:
        setting = {"seed": seed, "around": around, "rank": rank}
        rows.append({**setting, **task.score(params, test)})

    add("tuned", None, tuned)
    rank = max(RANKS)
    found = extract_adapter(task.loaded.params, tuned, linears(task, rank))
    for name, around in arounds.items():
        add(name, 0, around)  # nothing of the linears is left
        for k in RANKS if name == "tuned" else BASE_RANKS:
            add(name, k, merge_params(around, cut(found.lora, k), cut_targets(task, k)))
    return rows


def cut(lora: Any, rank: int) -> Any:
    """Returns the adapter that `extract_adapter` finds at a lower rank.

    Its singular triplets are in order, so the SVD need not be computed again.
    """
    leaves = flatten(lora)
    for path, leaf in leaves.items():
        leaves[path] = leaf[:, :rank] if path.endswith("lora_a") else leaf[:rank]
    return unflatten(leaves)


def cut_targets(task: Task, rank: int) -> list[Target]:
    """Returns the targets of an extracted adapter, whose scaling is 1."""
    return targets_of(task, LoRAConfig(rank=rank, alpha=rank, exclude=[HEAD]))


def train(task: Task, runs: Runs) -> None:
    """Tunes the learning rate at the first seed, then trains and measures all seeds."""
    file = task.files["movie"]["train"]
    training = FullTraining(task, file, embeddings=True)
    validation = task.batches(task.files["movie"]["validation"])

    kept: dict[float, Params] = {}

    def tune() -> list[dict[str, Any]]:
        for rate in RATES:
            kept[rate] = training.run(rate, SEEDS[0])
        return [{"rate": r, **task.score(p, validation)} for r, p in kept.items()]

    (rate,) = best(runs.once("tuning", tune), "rate")
    for seed in SEEDS:
        names = f"spectra {seed}", f"extractions {seed}"
        if not all(map(runs.of, names)):
            is_tuned = seed == SEEDS[0] and rate in kept
            tuned = kept[rate] if is_tuned else training.run(rate, seed)
            runs.once(names[0], lambda s=seed, x=tuned: spectra(task, x, s))
            runs.once(names[1], lambda s=seed, x=tuned: extractions(task, x, s))


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, then the report."""

    def task(quick: bool) -> Task:
        return Task(QUICK._replace(top=None) if quick else SIZE)

    run_short(__doc__, RESULTS, task, train, report, argv)


if __name__ == "__main__":
    main()
