"""Evaluating several adapters, each on the examples that name it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.names import TRAINABLE
from lora_jax.train.buckets import Batch
from lora_jax.train.mixed import evaluate_each

EACH = "adapters"  # of a line of metrics.jsonl, and of summary.json


def measure_each(
    step: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    adapters: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Measures all adapters.

    Args:
      step: from `make_mixed_eval_step`.
      variables: with all adapters.
      batches: the examples.
      adapters: their names.
      metrics: the names of the metrics.

    Returns:
      The metrics over all examples, and under `EACH` those of each adapter.
    """
    own = {key: variables[key] for key in TRAINABLE if key in variables}
    frozen = {key: tree for key, tree in variables.items() if key not in own}
    found = evaluate_each(step, own, frozen, batches, len(adapters))
    each = {
        name: {key: float(found[key][i]) for key in metrics}
        for i, name in enumerate(adapters)
    }
    return {**weighted_means(each, metrics, found["weight"]), EACH: each}


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
