"""Weights of an NNX model that are trained in full, in PEFT's files.

PEFT saves whole modules (``modules_to_save``), and biases beside adapters.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.interop.external import ExternalAdapter
from lora_jax.names import BIAS, SCALE
from lora_jax.tree.targets import Site

Names = Mapping[str, str | Sequence[str]]


class _Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
      path: of the weight in the model.
      site: of its module, if that can be adapted.
      index: in a stack of layers; empty without one.
      part: which of ``parts`` equal parts of the weight it is.
      parts: how many there are.
    """

    path: str
    site: Site | None
    index: tuple[int, ...]
    part: int
    parts: int

    def to_file(self, weight: Any) -> np.ndarray:
        """Returns the tensor in PyTorch's orientation."""
        array = np.asarray(weight, np.float32)[self.index]
        return np.split(self._turned(array), self.parts)[self.part]

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tensor's shape for the shape of the weight."""
        return self.to_file(np.broadcast_to(np.float32(0), shape)).shape

    def from_file(self, weight: np.ndarray, tensor: np.ndarray) -> None:
        """Writes a tensor into its place in a weight."""
        place = np.arange(weight.size).reshape(weight.shape)[self.index]
        place = np.split(self._turned(place), self.parts)[self.part]
        weight.reshape(-1)[place] = tensor

    def _turned(self, array: np.ndarray) -> np.ndarray:
        """Returns one layer's array in PyTorch's orientation."""
        if self.site is None or self.path != self.site.weight_path:
            return array.reshape(-1)
        if self.site.kind == "embed":
            return array
        roles = self.site.contraction
        order = np.argsort(np.argsort([*roles.inputs, *roles.outputs]))
        array = array.transpose(*order)  # [*in, *out]
        if self.site.kind == "conv":
            return np.moveaxis(array, (-1, -2), (0, 1))
        sizes = array.shape[: len(roles.inputs)]
        return array.reshape(int(np.prod(sizes)), -1).T


def to_full(
    sites: Sequence[Site],
    weights: Mapping[str, Any],
    trained: Collection[str],
    adapted: Collection[str],
    config: LoRAConfig,
    names: Names | None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns what is trained in full by PEFT's names, and the faults.

    Args:
      sites: every layer that can be adapted, and those that are.
      weights: the arrays of the model by path.
      trained: paths of those that are trained in full.
      adapted: paths of the adapted layers.
      config: of the model.
      names: see `lora_jax.nnx.export_adapter`.
    """
    faults, wanted = [], set(trained)
    for path in trained:
        module, _, name = path.rpartition("/")
        if name == BIAS and config.bias != "none":
            continue
        if module in adapted:
            faults.append(f"{path} is trained beside an adapter, which PEFT can't hold")
        wanted |= {p for p in weights if p.rpartition("/")[0] == module}
    tensors = dict(_tensors(sites, {p: weights[p] for p in sorted(wanted)}, names))
    known = {tensor.path for tensor in tensors.values()}
    faults += [f"{p} is trained, and has no name in PEFT" for p in wanted - known]
    return {n: t.to_file(weights[t.path]) for n, t in tensors.items()}, sorted(faults)


def from_full(
    adapter: ExternalAdapter,
    sites: Sequence[Site],
    weights: Mapping[str, Any],
    names: Names | None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns what an adapter's file trains in full by path, and the faults.

    Args:
      adapter: as it was read.
      sites: every layer of the model that can be adapted.
      weights: its weights by path.
      names: see `lora_jax.nnx.export_adapter`.
    """
    tensors = dict(_tensors(sites, weights, names)) if adapter.full else {}
    arrays, faults = {}, []
    for name, array in adapter.full.items():
        if name not in tensors:
            faults.append(f"unexpected: {name} is not a weight of this model")
            continue
        tensor = tensors[name]
        weight = weights[tensor.path]
        shape = tensor.shape_in_file(weight.shape)
        if array.shape != shape:
            faults.append(
                f"shape: {name} must be {list(shape)}; got {list(array.shape)}"
            )
            continue
        if tensor.path not in arrays:
            arrays[tensor.path] = np.array(weight[...], np.float32)
        tensor.from_file(arrays[tensor.path], array)
    return arrays, faults


def trained_modules(paths: Iterable[str], bias: str) -> str | tuple[str, ...]:
    """Returns the pattern of `LoRAConfig.train` for weights trained in full."""
    modules = {
        path.rpartition("/")[0]
        for path in paths
        if bias == "none" or path.rpartition("/")[2] != BIAS
    }
    return "|".join(map(re.escape, sorted(modules))) if modules else ()


def _tensors(
    sites: Sequence[Site], weights: Mapping[str, Any], names: Names | None
) -> Iterator[tuple[str, _Tensor]]:
    """Yields the file's name of each weight, one a layer and part of it."""
    by_path = {site.path: site for site in sites}
    for path, weight in weights.items():
        module, _, name = path.rpartition("/")
        site, spelled = by_path.get(module), names_of(module, names)
        shape, axes = getattr(weight, "shape", ()), site.scanned_a if site else ()
        is_plain = len(site.contraction.batch) == len(axes) if site else len(shape) == 1
        is_known = name in (BIAS, SCALE, site and site.weight)
        if not (module and spelled and is_known and is_plain and not sum(axes)):
            continue  # experts, stacks by other axes than the first, ...
        stack = shape[: len(axes)]
        if stack and not all("{}" in template for template in spelled):
            continue
        leaf = BIAS if name == BIAS else "weight"
        for index in np.ndindex(*stack):
            for part, template in enumerate(spelled):
                own = template.format(*index) if stack else template
                tensor = _Tensor(path, site, index, part, len(spelled))
                yield f"{own}.{leaf}", tensor


def names_of(path: str, names: Names | None) -> tuple[str, ...] | None:
    """Returns the names of a module in a file, several if it has it in parts.

    Args:
      path: of the module in the model.
      names: see `lora_jax.nnx.export_adapter`.
    """
    if names is None:
        return (path.replace("/", "."),)
    for pattern, given in names.items():
        if parsed := re.fullmatch(pattern, path):
            templates = (given,) if isinstance(given, str) else tuple(given)
            return tuple(parsed.expand(template) for template in templates)
    return None
