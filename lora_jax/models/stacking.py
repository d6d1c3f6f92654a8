"""Converts between scanned and unrolled decoder blocks: one model in two layouts.

Scanned, the parameters of all blocks are one tree under ``layers``, and each leaf has a
leading layer axis. That compiles fastest, which suits training; a decoding step would
spend most of its time copying each block's weights and cache out of the stack. Files
name every layer separately, so whatever reads or writes them goes through
`layer_slices`, and is the same code for both layouts.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig, matches
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.family import Family, Shape
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import BIAS, LAYERS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.nn.trace import Example, trace_model
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target
from lora_jax.tree.token_rows import full_of


class LayerSlice(NamedTuple):
    """Where one layer's array (or module), or one expert's part of it, is.

    Attributes:
      path: of the array in the model's tree.
      index: of the layer in that array; None if it isn't a stack.
      shape: of this part of the array.
      inside: index of an expert's part in the layer's array.
    """

    path: str
    index: int | None
    shape: Shape
    inside: Any = ...

    def of(self, array: Any) -> Any:
        """Returns this part of the array at ``path``."""
        layer = array if self.index is None else array[self.index]
        return layer if self.inside is ... else layer[self.inside]


def layer_slices(leaves: Mapping[str, Any]) -> dict[str, LayerSlice]:
    """Returns each layer's part of each array, by its path in the unrolled layout.

    ``leaves`` are arrays or shapes by their paths in the model's tree. An array that
    isn't a stack is one slice.

    Example:
      >>> found = layer_slices({"layers/mlp/up/kernel": (2, 3, 4), "norm/scale": (3,)})
      >>> found["layer_1/mlp/up/kernel"][:3]  # path, index, shape
      ('layers/mlp/up/kernel', 1, (3, 4))
      >>> list(found)
      ['layer_0/mlp/up/kernel', 'layer_1/mlp/up/kernel', 'norm/scale']
    """
    slices = {}
    for path, leaf in leaves.items():
        shape = tuple(getattr(leaf, "shape", leaf))
        if path.split("/")[0] != LAYERS:
            slices[path] = LayerSlice(path, None, shape)
            continue
        for i, single in enumerate(_layer_paths(path, shape[0])):
            slices[single] = LayerSlice(path, i, shape[1:])
    return slices


def file_slices(family: Family, leaves: Mapping[str, Any]) -> dict[str, LayerSlice]:
    """Returns where each tensor of a model's files is in its arrays.

    As `layer_slices`, but with a slice per expert if the family's files have a tensor
    for each, at paths such as ``layer_0/mlp/experts/expert_3/gate/kernel``.
    """
    found = {}
    for path, whole in layer_slices(leaves).items():
        module, _, leaf = path.rpartition("/")
        names = () if family.has_whole_experts else family.expert_parts(module)
        if not names:
            found[path] = whole
            continue
        count, *inputs, outputs = whole.shape
        size = outputs // len(names)
        for i in range(count):
            for j, name in enumerate(names):
                inside = (i, ..., slice(j * size, (j + 1) * size))
                part = whole._replace(shape=(*inputs, size), inside=inside)
                parent = module.rpartition("/")[0]
                found[f"{parent}/expert_{i}/{name}/{leaf}"] = part
    return found


def can_scan(lora: LoRAConfig, config: DecoderConfig) -> bool:
    """Returns whether a decoder with these adapters can scan its blocks.

    Scanned blocks share one path, so all layers must have the same parameters, ``lora``
    must not have ``layers`` or EVA's ranks, and each of its patterns must match all
    layers of a module or leaf and their stack, or none.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, num_kv_heads=1,
      ...     head_dim=4, mlp_size=8, max_positions=8,
      ... )
      >>> can_scan(LoRAConfig(targets=["query"]), config)
      True
      >>> can_scan(LoRAConfig(targets=["layer_0/attention/query"]), config)
      False
    """
    period = config.scan_period
    if lora.layers is not None or lora.init == "eva" or period is None:
        return False
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    decoder = Decoder(config, scan_layers=True)
    paths = set()  # of leaves and of modules; a pattern may name either
    for leaf in flatten(trace_model(decoder, None, Example.of(ids)).params):
        parts = leaf.split("/")
        if parts[0] == LAYERS:
            paths |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    return not any(
        _tells_apart(pattern, path, config.num_layers // period)
        for pattern in lora.patterns
        for path in paths
    )


def unscan(loaded: LoadedModel) -> LoadedModel:
    """Unrolls a scanned decoder: every block and its adapters get their own leaves.

    The function computed stays the same. On one CPU device the new arrays are views of
    the old ones (where XLA's alignment allows). Elsewhere they are copies, and both are
    in memory until the given model is dropped.

    Args:
      loaded: a decoder, with or without adapters; any other model is returned as is.

    Returns:
      The model with ``layer_{i}`` in place of ``layers``. Its `LoRAConfig` names each
      adapted layer by path; adapter dropout is off.
    """
    adapted = loaded.module if isinstance(loaded.module, Adapted) else None
    model: Any = loaded.module if adapted is None else adapted.model
    if not getattr(model, "scan_layers", False):
        return loaded
    variables = {name: _split(tree) for name, tree in loaded.variables.items()}
    module = model.clone(scan_layers=False)
    if adapted is not None:
        targets = adapted.targets(loaded.params)
        config = _by_layer(adapted.config, targets, full_of(variables))
        module = adapt(module, config, *loaded.inputs, deterministic=True)
    return loaded._replace(module=module, variables=variables)


def _layer_paths(path: str, count: int) -> list[str]:
    """Returns the unrolled layers' paths for a path inside the stack.

    With a period, ``layers/1_of_4/...`` has the layers 1, 5, 9 and so on.
    """
    inside = path.removeprefix(LAYERS)
    first, period = 0, 1
    if found := re.match(r"/(\d+)_of_(\d+)", inside):
        first, period = int(found[1]), int(found[2])
        inside = inside[found.end() :]
    return [f"layer_{i * period + first}{inside}" for i in range(count)]


def _tells_apart(pattern: Any, path: str, count: int) -> bool:
    """Returns whether a pattern matches some layers, but not all and the stack."""
    matched = [matches(pattern, single) for single in _layer_paths(path, count)]
    return any(matched) and not (all(matched) and matches(pattern, path))


def _split(tree: PyTree) -> PyTree:
    """Unrolls the stacked leaves of a collection."""
    flat = flatten(tree)
    parts = {
        path: _layers_of(array) if path.startswith(f"{LAYERS}/") else array
        for path, array in flat.items()
    }
    slices = layer_slices(flat)
    return unflatten({single: s.of(parts[s.path]) for single, s in slices.items()})


def _layers_of(stack: jax.Array) -> Sequence[jax.Array]:
    if len(stack.devices()) == 1 and next(iter(stack.devices())).platform == "cpu":
        return [jax.device_put(part) for part in np.asarray(stack)]  # views
    return _copied_layers(stack)


@jax.jit
def _copied_layers(stack: jax.Array) -> list[jax.Array]:
    return list(stack)


def _by_layer(
    config: LoRAConfig, targets: Sequence[Target], trained: PyTree
) -> LoRAConfig:
    """Returns the config with the unrolled paths; its patterns may name the stack."""
    of_stack = {target.path: target for target in targets}
    slices = layer_slices({path: t.kernel_shape for path, t in of_stack.items()})
    paths = {single: of_stack[s.path] for single, s in slices.items()}
    is_bias = {path: path.endswith(f"/{BIAS}") for path in flatten(trained)}
    return dataclasses.replace(
        config,
        targets=sorted(paths),
        exclude=(),
        rank_pattern={p: t.rank for p, t in paths.items() if t.rank != config.rank},
        alpha_pattern={p: t.alpha for p, t in paths.items() if t.alpha != config.alpha},
        train=sorted(p for p in is_bias if config.bias == "none" or not is_bias[p]),
    )
