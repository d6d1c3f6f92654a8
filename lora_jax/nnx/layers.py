"""NNX layers with LoRA: subclasses of flax's, with A and B beside the kernel.

The base class computes the layer and the op of its kind adds the update, so the layer
is bitwise equal to its base until A and B are trained. `lora_jax.nnx.adapt` makes the
same classes of a model's layers, and subclasses like them of other libraries' layers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.names import ADAPTER_LEAVES, BIAS, DROPOUT, MAGNITUDE, PARAMS
from lora_jax.nnx.rules import HEAD_METHODS, Rule, rule_of
from lora_jax.ops.embed import dora_query
from lora_jax.ops.init import path_key
from lora_jax.tree.targets import LINEAR_KINDS, Site, Target, as_target, child

STREAM = "lora_rngs"  # the attribute that holds a layer's dropout stream
OUT_SHARDING = "out_sharding"  # metadata: a name for each axis


class LayerLoRA(NamedTuple):
    """The settings of one adapted layer, equal for layers that compute alike.

    Attributes:
      config: the config of the whole model.
      alpha: numerator of the scaling.
      scaling: the factor before ``A B``.
      stack_axis: position of the layer axis of stacked layers, or None.
    """

    config: LoRAConfig
    alpha: float
    scaling: float
    stack_axis: int | None = None


class LoRALayer(nnx.Module):
    """Mixin of a layer with LoRA; inherited before the layer's class.

    Attributes:
      lora: the layer's settings, or None where the config doesn't target it.
      deterministic: disables adapter dropout; set by ``model.eval()``. Absent without
        adapter dropout.

    Variables: those of the layer, and beside its kernel ``lora_a``, ``lora_b`` and with
    DoRA ``magnitude`` (`flax.nnx.LoRAParam`).
    """

    lora: LayerLoRA | None

    def __init__(
        self, *args: Any, lora: LoRAConfig, path: str = "", rngs: nnx.Rngs, **kw: Any
    ) -> None:
        check_config(lora)
        super().__init__(*args, rngs=rngs, **kw)  # pyright: ignore[reportCallIssue] - the layer's
        give_lora(self, lora, path, rngs)

    def set_view(self, deterministic: bool | None = None, **kwargs: Any) -> None:
        """Sets attributes for `flax.nnx.view`.

        Args:
          deterministic: disables adapter dropout.
          **kwargs: what the layer itself takes.
        """
        if deterministic is not None and hasattr(self, "deterministic"):
            self.deterministic = deterministic
        inner = getattr(super(), "set_view", None)
        if inner is not None:
            names = inspect.signature(inner).parameters
            given = {"deterministic": deterministic, **kwargs}
            inner(**{name: given[name] for name in names if name in given})


def adapted_method(base: type, name: str) -> Any:
    """Returns the method of a layer class with the adapter applied to its output.

    Args:
      base: the layer's class.
      name: name of the method.

    Returns:
      A method for a subclass of `LoRALayer` and ``base``.
    """
    original: Callable[..., Any] = getattr(base, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> AnyFloat:
        if self.lora is None:
            return original(self, *args, **kwargs)
        rule = layer_rule(self)
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        _, *inputs = bound.args
        kernel = jnp.asarray(getattr(self, rule.weight)[...])
        a, b, m = (_value(self, leaf) for leaf in ADAPTER_LEAVES)
        options: dict[str, Any] = {"scaling": self.lora.scaling}
        if m is not None and name in HEAD_METHODS:
            inputs[0] = dora_query(jnp.asarray(inputs[0]), kernel, a, b, m, **options)
        elif m is not None:
            options["magnitude"] = m
            if (bias := _value(self, BIAS)) is not None:
                options["bias"] = bias
        y = original(self, *inputs, **bound.kwargs)
        if (rate := self.lora.config.dropout_rate) and not self.deterministic:
            options |= {"dropout_rate": rate, "dropout_key": getattr(self, STREAM)()}
        return rule.apply(self, name, tuple(inputs), y, kernel, a, b, **options)

    return method


class LoRALinear(LoRALayer, nnx.Linear):
    """`flax.nnx.Linear` with LoRA: ``y = x W0 + bias + scaling * (x A) B``.

    Takes the arguments of `flax.nnx.Linear`, and ``lora``, a `LoRAConfig`, whose
    ``rank`` and ``alpha`` hold for the layer. With ``path`` too, the layer looks itself
    up in the config by that path, and is a plain layer if it isn't a target.

    Variables: ``kernel`` ``[i, o]``, ``bias`` ``[o]``, ``lora_a`` ``[i, r]``,
    ``lora_b`` ``[r, o]``, with DoRA ``magnitude`` ``[o]``.

    Example:
      >>> layer = LoRALinear(10, 8, lora=LoRAConfig(rank=3), rngs=nnx.Rngs(0))
      >>> layer.lora_a.size + layer.lora_b.size
      54

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1.
    """

    __call__ = adapted_method(nnx.Linear, "__call__")


class LoRALinearGeneral(LoRALayer, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with LoRA, over any axes; see `LoRALinear`.

    Variables: ``kernel`` ``[*batch, *in, *out]``, ``bias``, ``lora_a`` ``[*batch, *in,
    r]``, ``lora_b`` ``[*batch, r, *out]``.
    """

    __call__ = adapted_method(nnx.LinearGeneral, "__call__")


class LoRAEinsum(LoRALayer, nnx.Einsum):
    """`flax.nnx.Einsum` with LoRA; labels shared by all three arrays are batch.

    See `LoRALinear` for ``lora`` and ``path``.

    Variables: ``kernel``, ``bias``, ``lora_a`` ``[*batch, *in, r]``, ``lora_b``
    ``[*batch, r, *out]``.
    """

    __call__ = adapted_method(nnx.Einsum, "__call__")


class LoRAEmbed(LoRALayer, nnx.Embed):
    """`flax.nnx.Embed` with LoRA, for both lookup and `attend` (a tied head).

    See `LoRALinear` for ``lora`` and ``path``. Dropout applies only in ``attend``: a
    lookup's input is one-hot.

    Variables: ``embedding`` ``[v, d]``, ``lora_a`` ``[v, r]``, ``lora_b`` ``[r, d]``.
    """

    __call__ = adapted_method(nnx.Embed, "__call__")
    attend = adapted_method(nnx.Embed, "attend")


class LoRAConv(LoRALayer, nnx.Conv):
    """`flax.nnx.Conv` with LoRA: a convolution to ``r`` channels, then 1 × 1.

    See `LoRALinear` for ``lora`` and ``path``. A masked convolution can't be adapted.

    Variables: ``kernel`` ``[*k, i/groups, o]``, ``bias`` ``[o]``, ``lora_a``
    ``[*k, i, r]``, ``lora_b`` ``[r, o]``, both with a leading axis of groups if there
    are several.
    """

    __call__ = adapted_method(nnx.Conv, "__call__")


class LoRAAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` with LoRA on any of its projections.

    Takes its arguments, ``lora``, a `LoRAConfig`, and ``path``, under which its
    projections ``query``, ``key``, ``value`` and ``out`` are looked up in the config.

    Example:
      >>> config = LoRAConfig(rank=2, targets=["query", "value"])
      >>> layer = LoRAAttention(4, 16, lora=config, decode=False, rngs=nnx.Rngs(0))
      >>> sorted(nnx.state(layer, nnx.LoRAParam))
      ['query', 'value']

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.2.
    """

    def __init__(
        self, *args: Any, lora: LoRAConfig, path: str = "", rngs: nnx.Rngs, **kw: Any
    ) -> None:
        check_config(lora)
        super().__init__(*args, rngs=rngs, **kw)
        for name in ("query", "key", "value", "out"):
            projection, where = getattr(self, name), child(path, name)
            set_class(projection, LoRALinearGeneral)
            give_lora(projection, lora, where, rngs)


_CLASSES: dict[type, type] = {
    cls.__mro__[2]: cls
    for cls in (LoRALinear, LoRALinearGeneral, LoRAEinsum, LoRAEmbed, LoRAConv)
}


def lora_class(cls: type, module: Any) -> type:
    """Returns the class that a layer of class ``cls`` has once it is adapted.

    Args:
      cls: a class that `rule_of` knows.
      module: an instance.

    Returns:
      A subclass of `LoRALayer` and ``cls``, the same for each call.
    """
    found = rule_of(cls, module)
    assert found is not None, cls
    known, rule = found
    if known not in _CLASSES:
        methods = {name: adapted_method(known, name) for name in rule.methods}
        _CLASSES[known] = _new_class((LoRALayer, known), methods)
    if cls not in _CLASSES:  # its overrides call up to the adapted methods
        _CLASSES[cls] = _new_class((cls, _CLASSES[known]), {})
    return _CLASSES[cls]


def _new_class(bases: tuple[type, ...], methods: dict[str, Any]) -> type:
    cls = bases[-1] if bases[0] is LoRALayer else bases[0]
    return type(f"LoRA{cls.__name__}", bases, {"__module__": __name__, **methods})


def set_class(module: Any, cls: type) -> None:
    """Makes a module an instance of ``cls``, past flax's record of its attributes."""
    object.__setattr__(module, "__class__", cls)


def base_class(cls: type) -> type:
    """Returns the class of a layer before it was adapted."""
    return next(c for c in cls.__mro__ if not issubclass(c, LoRALayer))


def layer_rule(layer: Any) -> Rule:
    """Returns the rule of an adapted layer."""
    found = rule_of(base_class(type(layer)), layer)
    assert found is not None, type(layer)
    return found[1]


def check_config(lora: Any) -> None:
    """Raises `TypeError` unless ``lora`` is a `LoRAConfig`."""
    if not isinstance(lora, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig; got {type(lora).__name__}.")


def site_of(path: str, module: Any, rule: Rule, stack_axis: int | None = None) -> Site:
    """Describes a layer that can be adapted.

    Layers stacked in one array (by `flax.nnx.vmap`) are told by the weight's shape, as
    the module declares it: the stacked weight has more axes.

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


def give_lora(layer: Any, config: LoRAConfig, path: str, rngs: nnx.Rngs) -> None:
    """Adds A and B to a new layer of a LoRA class, if the config targets its path."""
    rule = layer_rule(layer)
    layer.lora = None
    if not path or config.is_target(path, is_linear=rule.kind in LINEAR_KINDS):
        target = as_target(site_of(path, layer, rule), config)
        dropout_key = rngs[DROPOUT]() if config.dropout_rate else None
        add_factors(layer, target, config, rngs[PARAMS](), dropout_key)


def add_factors(
    layer: Any,
    target: Target,
    config: LoRAConfig,
    key: PRNGKey,
    dropout_key: PRNGKey | None,
    stack_axis: int | None = None,
) -> None:
    """Adds ``lora_a``, ``lora_b``, DoRA's ``magnitude`` and the settings to a layer.

    Args:
      layer: a layer of a LoRA class.
      target: its rank, scaling and shapes.
      config: of the model.
      key: PRNG key of A; the path is folded in.
      dropout_key: PRNG key of the masks, likewise; needed if the config has dropout.
      stack_axis: see `site_of`.
    """
    weight = getattr(layer, target.weight)
    values = dict(zip(ADAPTER_LEAVES, target.init(key, config.init), strict=False))
    if target.dora:
        values[MAGNITUDE] = target.init_magnitude(weight[...])
    metadata = weight.get_metadata()
    names = metadata.get(OUT_SHARDING)
    axes = target.leaf_axes(tuple(names)) if names else {}
    kept = {k: metadata[k] for k in ("mesh", "sharding_rules") if k in metadata}
    places = _placements(weight[...], target)
    for name, value in values.items():
        own = {**kept, OUT_SHARDING: axes[name]} if axes else {}
        value = jax.device_put(value, places[name]) if places else value
        setattr(layer, name, nnx.LoRAParam(value, **own))
    layer.lora = LayerLoRA(config, target.alpha, target.scaling, stack_axis)
    if dropout_key is not None:
        layer.deterministic = False
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


def _value(layer: Any, name: str) -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else jnp.asarray(variable[...])
