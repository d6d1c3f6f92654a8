"""Adapters of other tools, in the words of none of them.

PEFT, mlx-lm and loralib store the same matrices under other names and in other
orientations. Their readers all give a `ExternalAdapter`; what it means for a model of
ours is said once, in `lora_jax.interop.attach`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Factors(NamedTuple):
    """One adapted module: ``ΔW = scaling * B A``, in PyTorch's orientation.

    Attributes:
      a: ``[r, in]``; of a convolution ``[r, in, *k]``, of an embedding ``[r, vocab]``.
      b: ``[out, r]``; of an embedding ``[dim, r]``.
      scaling: the factor before ``B A``.
      alpha: numerator of the scaling, as the config has it.
      magnitude: DoRA's ``[out]``, or None.
      is_embedding: whether the tool stored it as an embedding's; None if it can't be
        told.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float
    alpha: float
    magnitude: np.ndarray | None = None
    is_embedding: bool | None = False

    @property
    def rank(self) -> int:
        """The inner dimension ``r``."""
        return self.a.shape[0]


class ExternalAdapter(NamedTuple):
    """An adapter as another tool wrote it, read strictly and in memory.

    Attributes:
      modules: the factors by Hugging Face module name.
      full: tensors trained in full, by Hugging Face tensor name.
      base: copies of base weights that the tool put beside them, by tensor name.
      config: the tool's config, as given, with keys that nobody here knows.
      rslora: whether scalings are ``alpha / sqrt(rank)``.
      dropout_rate: of the adapters' inputs in training.
      bias: which biases are among ``full``: ``"none"``, ``"lora_only"`` or ``"all"``.
      is_tied_once: whether the adapter of an embedding that is the head too stands in
        the file once, for both, and not as two.
      unknown: keys of the config that are kept and have no meaning here.
      origin: the folder or file, for errors.
    """

    modules: dict[str, Factors]
    full: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    config: Mapping[str, Any]
    rslora: bool = False
    dropout_rate: float = 0.0
    bias: str = "none"
    is_tied_once: bool = False
    unknown: tuple[str, ...] = ()
    origin: str = "the adapter"

    @property
    def dora(self) -> bool:
        """Whether the modules have magnitudes."""
        return any(f.magnitude is not None for f in self.modules.values())


def read_floats(reader: Any, names: Mapping[Any, str]) -> tuple[dict, list[str]]:
    """Reads tensors, and gathers what is wrong with their types and values.

    Args:
      reader: gives ``reader[name]``.
      names: a key for each tensor's name in the file.

    Returns:
      The arrays by key, factors of 16 bits widened to float32, and the faults.
    """
    arrays, faults = {}, []
    for key, name in names.items():
        array = reader[name]
        if array.dtype.kind in "iubcOSUMm" or array.dtype.names:
            faults.append(f"dtype: {name} must be floats; got {array.dtype}")
            continue
        with np.errstate(over="ignore"):  # not finite, below
            array = array.astype(np.float32)
        count = int(array.size - np.isfinite(array).sum())
        if count:
            faults.append(f"not finite: {name}, {count} of {array.size} values")
        arrays[key] = array
    return arrays, faults


def report(origin: str, faults: list[str]) -> ValueError:
    """Returns the one error that lists every fault of an adapter."""
    shown = "\n  ".join(faults[:MAX_SHOWN])
    more = len(faults) - MAX_SHOWN
    rest = f"\n  and {more} more" if more > 0 else ""
    return ValueError(
        f"{origin} has {len(faults)} faults; nothing was loaded.\n  {shown}{rest}"
    )


MAX_SHOWN = 50
