"""Adapters from other tools, in one tool-independent form.

PEFT, mlx-lm and loralib store the same matrices under different names and in different
orientations. All their readers return an `ExternalAdapter`, which
`lora_jax.interop.attach` attaches to a model.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files.adapter import CONFIG as ADAPTER_CONFIG
from lora_jax.files.atomic import new_folder, write_text
from lora_jax.files.safetensors import write_tensors

MAX_SHOWN = 50  # problems listed in one error


class ExternalFactors(NamedTuple):
    """One adapted module: ``ΔW = scaling * B A``, in PyTorch's orientation.

    Attributes:
      a: ``[r, in]``; of a convolution ``[r, in, *k]``, of an embedding ``[r, vocab]``,
        of experts ``[e, r, in]``.
      b: ``[out, r]``; of an embedding ``[dim, r]``, of experts ``[e, out, r]``.
      scaling: the factor before ``B A``.
      alpha: numerator of the scaling, as in the config.
      magnitude: DoRA's ``[out]``, or None.
      is_embedding: whether it was stored as an embedding's; None if the format doesn't
        say.
      bias: ``[out]`` bias of the update ``scaling * (B A x + bias)``, or None.
      is_wide: whether ``a`` is for the widest module, of which each takes the first
        inputs (VeRA).
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float
    alpha: float
    magnitude: np.ndarray | None = None
    is_embedding: bool | None = False
    bias: np.ndarray | None = None
    is_wide: bool = False

    def narrowed(self, inputs: int) -> "ExternalFactors":
        """Returns the factors of a module with ``inputs`` inputs."""
        a = self.a[:, :inputs] if self.is_wide else self.a
        return self._replace(a=a, is_wide=False)

    @property
    def rank(self) -> int:
        """The inner dimension ``r``."""
        return self.b.shape[-1]

    @property
    def is_experts(self) -> bool:
        """Whether these are the factors of all experts of a layer."""
        return self.b.ndim == 3


class ExternalAdapter(NamedTuple):
    """Another tool's adapter, strictly validated and in memory.

    Attributes:
      modules: the factors by Hugging Face module name.
      full: tensors trained in full, by Hugging Face tensor name.
      base: copies of base weights stored with the adapter, by tensor name.
      config: the tool's config as given, unknown keys included.
      rslora: whether scalings are ``alpha / sqrt(rank)``.
      dropout_rate: dropout of the adapters' inputs in training.
      bias: which biases are among ``full``: ``"none"``, ``"lora_only"`` or ``"all"``.
      tokens: by module (an embedding or a head), token ids and the ``[tokens, dim]``
        rows that replace theirs.
      is_tied_once: whether one adapter of a tied embedding or head is meant for both.
      unknown: keys of the config that have no effect here.
      origin: the folder or file, for error messages.
    """

    modules: dict[str, ExternalFactors]
    full: Mapping[str, np.ndarray] = MappingProxyType({})
    base: Mapping[str, np.ndarray] = MappingProxyType({})
    config: Mapping[str, Any] = MappingProxyType({})
    rslora: bool = False
    dropout_rate: float = 0.0
    bias: str = "none"
    tokens: Mapping[str, tuple[list[int], np.ndarray]] = MappingProxyType({})
    is_tied_once: bool = False
    unknown: tuple[str, ...] = ()
    origin: str = "the adapter"

    @property
    def dora(self) -> bool:
        """Whether the modules have magnitudes."""
        return any(f.magnitude is not None for f in self.modules.values())


def read_floats(reader: Any, names: Mapping[Any, str]) -> tuple[dict, list[str]]:
    """Reads tensors as float32; ``names`` maps a key to each tensor's name in the file.

    Returns the arrays by key, and the problems with their dtypes and values.
    """
    arrays, faults = {}, []
    for key, name in names.items():
        array = reader[name]
        if array.dtype.kind in "iubcOSUMm" or array.dtype.names:
            faults.append(f"dtype: {name} must be floats; got {array.dtype}")
            continue
        with np.errstate(over="ignore"):  # reported as not finite, below
            array = array.astype(np.float32, copy=False)
        count = int(array.size - np.isfinite(array).sum())
        if count:
            faults.append(f"not finite: {name}, {count} of {array.size} values")
        arrays[key] = array
    return arrays, faults


def write_folder(
    directory: str | os.PathLike[str],
    file: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    kind: str,
    prefix: str = "",
) -> Path:
    """Writes an adapter folder, atomically replacing an existing one.

    Args:
      directory: created if absent.
      file: name of the safetensors file.
      tensors: its tensors.
      config: content of ``adapter_config.json``.
      kind: the ``format`` in the header of ``file``.
      prefix: of all names in the file.

    Raises:
      ValueError: if a tensor is not finite; lists all of them.
      OSError: if the folder can't be written.
    """
    if bad := [n for n, t in tensors.items() if not np.isfinite(t).all()]:
        raise ValueError(f"an adapter must be finite to be saved; {', '.join(bad)}.")
    ordered = {prefix + name: tensors[name] for name in sorted(tensors)}
    folder = Path(directory)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with new_folder(folder) as new:
        write_tensors(new / file, ordered, metadata={"format": kind})
        write_text(new / ADAPTER_CONFIG, text)
    return folder


def most_common(values: Iterable[Any]) -> Any:
    """Returns the most frequent value, the first one in a tie."""
    return Counter(values).most_common(1)[0][0]


def report(origin: str, faults: list[str]) -> ValueError:
    """Returns one error for all problems of an adapter; lists the first 50."""
    shown = "\n  ".join(faults[:MAX_SHOWN])
    more = len(faults) - MAX_SHOWN
    rest = f"\n  and {more} more" if more > 0 else ""
    return ValueError(
        f"{origin} has {len(faults)} faults; nothing was loaded.\n  {shown}{rest}"
    )
