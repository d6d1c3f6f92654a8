"""The frozen base with a linear head: what LoRA has to beat."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.cli.console import Console
from lora_jax.cli.job import Job, Split, eval_batches, sentence_vectors
from lora_jax.train.probe import fit_probe, probe_accuracy


def fit_baseline(
    job: Job, splits: Mapping[str, Split], buckets: Sequence[int], out: Console
) -> dict[str, Any]:
    """Fits a linear head on cached sentence vectors of the frozen base.

    Args:
      job: the model; its adapters are not looked at.
      splits: ``train`` to fit on, ``validation`` to choose the L2 penalty by, and all
        others to be scored once.
      buckets: lengths to pad to.
      out: where to show how far it is.

    Returns:
      ``validation_accuracy``, ``test_accuracy`` (None without a test split), ``l2``.
    """
    batches = {name: eval_batches(split, buckets) for name, split in splits.items()}
    vectors, labels, done = {}, {}, 0
    with out.progress(
        "encode", sum(b.steps_per_epoch for b in batches.values())
    ) as tick:
        for name, split in batches.items():

            def show(count: int, before: int = done) -> None:
                tick(before + count, "batches")

            vectors[name] = sentence_vectors(job, split, show)
            labels[name] = np.array([e["label"] for e in splits[name].examples])
            done += split.steps_per_epoch
    probe = fit_probe(
        vectors["train"],
        labels["train"],
        (vectors["validation"], labels["validation"]),
        num_labels=len(job.labels),
    )
    test = (
        probe_accuracy(probe, vectors["test"], labels["test"])
        if "test" in vectors
        else None
    )
    return {
        "validation_accuracy": probe.accuracy,
        "test_accuracy": test,
        "l2": probe.penalty,
    }
