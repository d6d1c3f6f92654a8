"""One module a block, where a decoder was loaded with all its blocks as one `nn.scan`.

A scanned block is compiled once, which suits training. A step of decoding would spend
most of its time on copying each block's weights and cache out of their stacks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.models.load import LoadedModel, unscanned
from lora_jax.names import BIAS, PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target


def unscan(loaded: LoadedModel) -> LoadedModel:
    """Gives every block of a scanned decoder, and its adapters, leaves of their own.

    The function stays the same. On one CPU device the new arrays lie in the old ones
    (those that XLA's alignment allows). Elsewhere they are copies, and memory holds
    both until the model that was given is dropped.

    Args:
      loaded: a decoder, with adapters or without; any other model comes back as it is.

    Returns:
      The model with ``layer_{i}`` in place of ``layers``. Its `LoRAConfig` names each
      adapted layer by its path; dropout of adapters is off.
    """
    adapted = loaded.module if isinstance(loaded.module, Adapted) else None
    model: Any = loaded.module if adapted is None else adapted.model
    if not getattr(model, "scan_layers", False):
        return loaded
    variables = {name: _split(tree) for name, tree in loaded.variables.items()}
    module = model.clone(scan_layers=False)
    if adapted is not None:
        targets = adapted.targets(loaded.params)
        config = _by_path(adapted.config, targets, variables.get(PARAMS, {}))
        module = adapt(module, config, *loaded.inputs, deterministic=True)
    return loaded._replace(module=module, variables=variables)


def _split(tree: PyTree) -> PyTree:
    """Returns a collection with the leaves of single blocks."""
    flat = {}
    for path, array in flatten(tree).items():
        leaf = tuple(path.split("/"))
        singles = unscanned(leaf, array.shape)
        parts = [array] if singles == [leaf] else _slices(array)
        flat |= {"/".join(s): part for s, part in zip(singles, parts, strict=True)}
    return unflatten(flat)


def _slices(stack: jax.Array) -> Sequence[jax.Array]:
    if len(stack.devices()) == 1 and next(iter(stack.devices())).platform == "cpu":
        return [jax.device_put(part) for part in np.asarray(stack)]  # views
    return _copied_slices(stack)


@jax.jit
def _copied_slices(stack: jax.Array) -> list[jax.Array]:
    return list(stack)


def _by_path(
    config: LoRAConfig, targets: Sequence[Target], trained: PyTree
) -> LoRAConfig:
    """Returns the config in the paths of single blocks: patterns may name the stack."""
    paths = {
        "/".join(single): target
        for target in targets
        for single in unscanned(tuple(target.path.split("/")), target.kernel_shape)
    }
    is_bias = {path: path.endswith(f"/{BIAS}") for path in flatten(trained)}
    return dataclasses.replace(
        config,
        targets=sorted(paths),
        exclude=(),
        rank_pattern={p: t.rank for p, t in paths.items() if t.rank != config.rank},
        alpha_pattern={p: t.alpha for p, t in paths.items() if t.alpha != config.alpha},
        train=sorted(p for p in is_bias if config.bias == "none" or not is_bias[p]),
    )
