"""Evaluating several adapters, each on the examples that name it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.finetune.job import Job
from lora_jax.names import TRAINABLE
from lora_jax.train.buckets import Batch, Schedule
from lora_jax.train.mixed import evaluate_each, make_mixed_eval_step

EACH = "adapters"  # of a line of metrics.jsonl, and of summary.json


def mixed_eval_step(job: Job, batches: Schedule) -> Any:
    """Returns the evaluation of a job's rows.

    Args:
      job: with ``adapters``.
      batches: of one of its splits.

    Returns:
      See `make_mixed_eval_step`.
    """
    rows = batches.batch_size
    return make_mixed_eval_step(job.loss(job.adapted, is_training=False, copies=rows))


def measure_each(
    step: Any, job: Job, variables: Mapping[str, Any], batches: Iterable[Batch]
) -> dict[str, Any]:
    """Measures all adapters.

    Args:
      step: from `mixed_eval_step`.
      job: with ``adapters``.
      variables: with all adapters.
      batches: the examples.

    Returns:
      The job's metrics over all examples, and under `EACH` those of each adapter.
    """
    own = {key: variables[key] for key in TRAINABLE if key in variables}
    frozen = {key: tree for key, tree in variables.items() if key not in own}
    found = evaluate_each(step, own, frozen, batches, len(job.adapters))
    each = {
        name: {key: float(found[key][i]) for key in job.metrics}
        for i, name in enumerate(job.adapters)
    }
    return {**weighted_means(each, job.metrics, found["weight"]), EACH: each}


def weighted_means(
    each: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], weights: np.ndarray
) -> dict[str, float]:
    """Averages metrics over the adapters for which they are finite.

    Args:
      each: the metrics of every adapter.
      metrics: their names.
      weights: of the adapters.

    Returns:
      The weighted means; NaN if no adapter has finite metrics.
    """
    rows = [[own[key] for key in metrics] for own in each.values()]
    values = np.array(rows, np.float64)
    is_kept = np.isfinite(values).all(axis=1) & (weights > 0)
    if not is_kept.any():
        return dict.fromkeys(metrics, math.nan)
    means = np.average(values[is_kept], axis=0, weights=weights[is_kept])
    return dict(zip(metrics, map(float, means), strict=True))
