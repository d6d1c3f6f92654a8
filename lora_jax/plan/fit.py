"""Searching for what fits in memory: the first of several choices, the largest batch.

A compilation takes minutes, so bisection is too slow. Memory grows linearly with the
number of rows: two compilations give the line and a third verifies the prediction; only
if it was wrong are there more.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lora_jax.models.decoder import REMATS
from lora_jax.plan.step import StepPlan

Price = Callable[[int, str | None], StepPlan]  # (rows, remat policy) -> plan
K = TypeVar("K")


def device_memory(device: Any) -> int:
    """Returns a local device's memory for arrays in bytes; for a CPU the machine's."""
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def first_fitting(
    price: Callable[[K], StepPlan], choices: Iterable[K]
) -> tuple[K | None, dict[K, StepPlan]]:
    """Finds the first choice (a slice, a remat policy) with which a step fits.

    Args:
      price: returns the plan of a choice. It skips compiling if the weights alone are
        too large, so small slices are cheap to try.
      choices: the choices in order of preference.

    Returns:
      The first that fits, or None, and the plans of all choices tried.
    """
    tried = {}
    for choice in choices:
        tried[choice] = price(choice)
        if tried[choice].fits:
            return choice, tried
    return None, tried


def fitting_remat(price: Price, rows: int, remat: str | None) -> list[StepPlan]:
    """Tries a decoder's rematerialisation policies until the step fits.

    Args:
      price: returns the plan of a step.
      rows: rows of its batch.
      remat: the first policy to try, followed by those that save less memory; None for
        a model without policies.

    Returns:
      The plans in the order tried: only the last one can fit.
    """
    _, tried = first_fitting(lambda policy: price(rows, policy), remats_from(remat))
    return list(tried.values())


def remats_from(remat: str | None) -> Sequence[str | None]:
    """Returns a policy and those that save more memory; of None only itself."""
    policies = list(REMATS)
    return [None] if remat is None else policies[policies.index(remat) :]


def largest_batch(price: Callable[[int], StepPlan], unit: int) -> StepPlan | None:
    """Finds the largest batch that fits, with at most 5 compilations.

    Args:
      price: returns the plan for a number of rows.
      unit: the smallest batch, and the divisor of all others: one row per batch shard.

    Returns:
      The plan of the largest batch verified to fit; None if ``unit`` rows don't.
    """
    first = price(unit)
    if not first.fits:
        return None
    low = price(2 * unit)
    slope = low.total - first.total  # bytes per device for `unit` more rows
    if not low.fits or slope <= 0:
        return low if low.fits else first
    high, guess = None, 1 + (first.limit - first.total) // slope
    for _ in range(3):
        if guess * unit <= low.batch:
            break
        found = price(guess * unit)
        if not found.fits:
            high = found
        else:
            low = found
            if high is None:  # the line predicts that one more does not fit
                break
        assert high is not None
        share = (low.limit - low.total) / max(high.total - low.total, 1)
        between = low.batch + share * (high.batch - low.batch)
        guess = min(int(between) // unit, high.batch // unit - 1)
    return low
