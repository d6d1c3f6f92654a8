"""TPU slices as compilation targets.

``libtpu`` describes a slice and compiles for it ahead of time on any machine.
"""

import contextlib
import difflib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

GIB = 2**30


class Chip(NamedTuple):
    """One kind of TPU.

    Attributes:
      memory: bytes of a chip's HBM, of which slightly less is usable.
      slices: the available topologies, smallest first.

    References:
      https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e: "HBM2 capacity" of a
      chip, and the topologies.
    """

    memory: int
    slices: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v5e": Chip(16 * GIB, _FLAT),
    "v5p": Chip(95 * GIB, _DEEP),
    "v6e": Chip(32 * GIB, _FLAT),
}


def check_topology(name: str) -> Chip:
    """Returns the chip of a slice, named by chip and shape, ``"v5e:4x4"``.

    Raises:
      ValueError: if there is no such slice; suggests the nearest ones.

    Example:
      >>> check_topology("v5e:4x4").memory // GIB, chips_of("v5e:4x4")
      (16, 16)
    """
    kind, _, shape = name.partition(":")
    if kind in CHIPS and shape in CHIPS[kind].slices:
        return CHIPS[kind]
    if kind in CHIPS:
        near = _nearest_shapes(shape, CHIPS[kind].slices)
        raise ValueError(
            f"topology {name!r} does not exist: {kind} has no slice {shape!r}. The "
            f"nearest are {', '.join(f'{kind}:{s}' for s in near)}; all are "
            f"{', '.join(CHIPS[kind].slices)}."
        )
    having = [k for k, chip in CHIPS.items() if shape in chip.slices] or list(CHIPS)
    near = difflib.get_close_matches(kind, having, n=1, cutoff=0.0)[0]
    example = shape if shape in CHIPS[near].slices else CHIPS[near].slices[2]
    raise ValueError(
        f"topology {name!r} must be a chip ({', '.join(CHIPS)}) and a shape, like "
        f"'{near}:{example}'; there is no chip {kind!r} here."
    )


def chips_of(name: str) -> int:
    """Returns the number of chips in a slice: the product of its shape."""
    return math.prod(int(side) for side in name.partition(":")[2].split("x"))


def slices_like(name: str) -> list[str]:
    """Returns all slices of the same chip, smallest first."""
    kind = name.partition(":")[0]
    return [f"{kind}:{shape}" for shape in CHIPS[kind].slices]


def _nearest_shapes(shape: str, known: tuple[str, ...]) -> list[str]:
    """Returns the two shapes nearest to ``shape`` in number of chips."""
    sides = shape.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        return list(known[:2])
    wanted = math.prod(map(int, sides))
    near = sorted(known, key=lambda s: abs(math.log(chips_of(f":{s}") / wanted)))
    return sorted(near[:2], key=lambda s: chips_of(f":{s}"))


def open_slice(name: str) -> list[Any]:
    """Returns the devices of a slice, one per chip, for compilation only.

    Raises:
      ValueError: if there is no such slice.
      ModuleNotFoundError: if ``libtpu`` is not installed.
    """
    check_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            'compiling for a TPU needs libtpu: pip install "lora_jax[tpu-plan]".',
            name="libtpu",
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # skip a slow network query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    if jax.config.values["jax_platforms"] is None:  # stop JAX from looking for a TPU
        jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    if len(devices) != chips_of(name):
        raise ValueError(
            f"topology {name!r} must have {chips_of(name)} devices; libtpu gives "
            f"{len(devices)}."
        )
    return list(devices)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Disables JAX's compilation cache: it can't load programs for absent devices."""

    def switch(is_on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", is_on)
        compilation_cache.reset_cache()  # it reads the flag only once

    before = jax.config.values["jax_enable_compilation_cache"]
    switch(False)
    try:
        yield
    finally:
        switch(before)
