"""What fits: the largest batch on given devices, the smallest slice for a batch.

A compilation takes minutes, so neither is bisected. Memory grows by a constant for each
row: two compilations give the line, a third checks the answer, and only where it was
wrong are there more.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar


class Priced(Protocol):
    """What a step needs, as `StepPlan` says it: bytes, and whether they are there."""

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    @property
    def total(self) -> int:
        """Bytes a device."""
        ...

    @property
    def limit(self) -> int:
        """Bytes that a device has."""
        ...

    @property
    def fits(self) -> bool:
        """Whether the step does."""
        ...


P = TypeVar("P", bound=Priced)


def device_memory(device: Any) -> int:
    """Returns the bytes of memory that a device can hold arrays in.

    Args:
      device: a `jax.Device` of this machine.

    Returns:
      What its allocator may take; of a CPU the machine's memory.
    """
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_batch(price: Callable[[int], P], unit: int) -> P | None:
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


def smallest_slice(
    price: Callable[[str], P], slices: Iterable[str]
) -> tuple[str | None, dict[str, P]]:
    """Finds the smallest slice that a step fits.

    Args:
      price: the plan on a slice. Where the weights alone are too large it compiles
        nothing, so small slices cost nothing.
      slices: from the smallest.

    Returns:
      The first that fits, or None, and the plans of all that were tried.
    """
    tried = {}
    for name in slices:
        tried[name] = price(name)
        if tried[name].fits:
            return name, tried
    return None, tried
