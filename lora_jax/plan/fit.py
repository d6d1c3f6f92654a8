"""What fits: the first of several choices, the largest batch; how much there is.

A compilation takes minutes, so no batch is bisected. Memory grows by a constant for
each row: two compilations give the line, a third checks the answer, and only where it
was wrong are there more.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from lora_jax.models.decoder import REMATS
from lora_jax.plan.step import StepPlan

Price = Callable[[int, str | None], StepPlan]  # of a number of rows, and a remat policy
K = TypeVar("K")


def device_memory(device: Any) -> int:
    """Returns the bytes that arrays on a `jax.Device` of this machine can take.

    Args:
      device: the device.

    Returns:
      What its allocator may take; of a CPU the machine's memory.
    """
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def first_fitting(
    price: Callable[[K], StepPlan], choices: Iterable[K]
) -> tuple[K | None, dict[K, StepPlan]]:
    """Finds the first choice that a step fits with: a slice, a remat policy.

    Args:
      price: the plan of a choice. Where the weights alone are too large it compiles
        nothing, so small slices cost nothing.
      choices: from what is liked best, or is smallest.

    Returns:
      The first that fits, or None, and the plans of all that were tried.
    """
    tried = {}
    for choice in choices:
        tried[choice] = price(choice)
        if tried[choice].fits:
            return choice, tried
    return None, tried


def fitting_remat(price: Price, rows: int, remat: str | None) -> list[StepPlan]:
    """Tries what a decoder's backward pass computes again, until the step fits.

    Args:
      price: of a step.
      rows: of its batch.
      remat: the policy to begin with, on which follow those that keep less; None for
        a model that has none.

    Returns:
      The plans in the order in which they were tried: the last one fits, or none does.
    """
    policies = list(REMATS)
    choices = [None] if remat is None else policies[policies.index(remat) :]
    _, tried = first_fitting(lambda policy: price(rows, policy), choices)
    return list(tried.values())


def largest_batch(price: Callable[[int], StepPlan], unit: int) -> StepPlan | None:
    """Finds the largest batch that fits, with at most 5 compilations.

    Args:
      price: the plan of a batch of so many rows.
      unit: the smallest batch, of which all others are multiples: one row for each part
        of the mesh that splits a batch.

    Returns:
      The plan of the largest batch that was seen to fit; None if not even ``unit``
      rows do.
    """
    first = price(unit)
    if not first.fits:
        return None
    low = price(2 * unit)
    slope = low.total - first.total  # bytes a device for `unit` more rows
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
            if high is None:  # by the line, one more would not fit
                break
        assert high is not None  # one of the two was just set, or the loop has ended
        share = (low.limit - low.total) / max(high.total - low.total, 1)
        between = low.batch + share * (high.batch - low.batch)
        guess = min(int(between) // unit, high.batch // unit - 1)
    return low
