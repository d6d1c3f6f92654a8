"""The adapter of one NNX layer: its shapes, its values, and where they are placed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.names import DROPOUT, LORA
from lora_jax.nnx.rules import Rule
from lora_jax.ops.init import path_key
from lora_jax.tree.targets import Site, Target

STREAM = "lora_rngs"  # the attribute that holds a layer's dropout stream
OUT_SHARDING = "out_sharding"  # metadata: a name for each axis


class FixedParam(nnx.Param):
    """A leaf of an adapter that isn't trained; not a `flax.nnx.LoRAParam`."""


class LayerLoRA(NamedTuple):
    """The settings of one adapted layer, equal for layers that compute alike.

    Attributes:
      config: the config of the whole model.
      alpha: numerator of the scaling.
      scaling: the factor before ``A B``.
      stack_axis: position of the layer axis of stacked layers, or None.
      is_plain: as in `lora_jax.tree.targets.Site`.
    """

    config: LoRAConfig
    alpha: float
    scaling: float
    stack_axis: int | None = None
    is_plain: bool = True


def site_of(path: str, module: Any, rule: Rule, stack_axis: int | None = None) -> Site:
    """Describes a layer that can be adapted.

    Layers stacked in one array (by `flax.nnx.vmap`) are recognised because the weight
    has more axes than the shape that the module declares.

    Args:
      path: the module's path in the model.
      module: the module.
      rule: its rule.
      stack_axis: position of the layer axis, where the shapes leave it open.

    Returns:
      The site.

    Raises:
      ValueError: if the axes of its equation have no role in LoRA, or the position of
        a stacked axis is open.
    """
    shape = tuple(getattr(module, rule.weight).shape)
    roles, declared = rule.contraction(module), rule.shape(module)
    ndim = sum(map(len, roles[:3]))
    extra = len(shape) - ndim
    if not extra:
        return Site(path, rule.kind, rule.weight, shape, roles)
    starts = range(ndim + 1) if extra > 0 else ()
    places = [tuple(range(at, at + extra)) for at in starts if stack_axis in (None, at)]
    if declared is not None:
        places = [p for p in places if tuple(np.delete(shape, p)) == tuple(declared)]
    if len(places) != 1:
        wanted = f"{ndim} axes" if declared is None else f"shape {tuple(declared)}"
        raise ValueError(
            f"{rule.weight} must have {wanted}, or be a stack of such, one a layer; "
            f"got shape {shape}, with {len(places)} possible layer axes. Give `adapt` "
            "the position of the layer axis, `stack_axis=0`"
        )
    (axes,) = places
    stacked = roles.stacked(axes)
    return Site(path, rule.kind, rule.weight, shape, stacked, axes, axes, axes)


def add_lora(
    layer: Any,
    target: Target,
    config: LoRAConfig,
    values: Mapping[str, AnyFloat],
    dropout_key: PRNGKey | None,
    stack_axis: int | None = None,
) -> None:
    """Adds an adapter and its settings to a layer, placed as its weight is.

    Args:
      layer: a layer of a LoRA class.
      target: its rank, scaling and shapes.
      config: of the model.
      values: of its leaves, by name.
      dropout_key: PRNG key of the masks; the path is folded in. None disables adapter
        dropout.
      stack_axis: see `site_of`.
    """
    weight = getattr(layer, target.weight)
    metadata = weight.get_metadata()
    names = metadata.get(OUT_SHARDING)
    axes = target.leaf_axes(tuple(names)) if names else {}
    kept = {k: metadata[k] for k in ("mesh", "sharding_rules") if k in metadata}
    places, held = _placements(weight[...], target), dict(target.leaves)
    for name, value in values.items():
        own = {**kept, OUT_SHARDING: axes[name]} if axes else {}
        value = jax.device_put(value, places[name]) if places else value
        kind = nnx.LoRAParam if held[name] == LORA else FixedParam
        setattr(layer, name, kind(value, **own))
    numbers = (target.alpha, target.scaling)
    layer.lora = LayerLoRA(config, *numbers, stack_axis, target.is_plain)
    if config.dropout_rate:
        layer.deterministic = dropout_key is None
    if config.dropout_rate and dropout_key is not None:
        stack = tuple(target.kernel_shape[axis] for axis in target.scanned_a)
        key = path_key(dropout_key, target.path)
        key = jax.random.split(key, stack) if stack else key
        setattr(layer, STREAM, nnx.RngStream(key, tag=DROPOUT))


def _placements(kernel: Any, target: Target) -> dict[str, NamedSharding]:
    """Returns where A, B and m go beside a kernel that lies on a mesh."""
    place = getattr(kernel, "sharding", None)
    if isinstance(kernel, Tracer) or not isinstance(place, NamedSharding):
        return {}
    spec = (*place.spec, *(None,) * (kernel.ndim - len(place.spec)))
    axes = target.leaf_axes(spec)
    return {n: NamedSharding(place.mesh, PartitionSpec(*a)) for n, a in axes.items()}
