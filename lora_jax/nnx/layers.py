"""NNX layers with LoRA: subclasses of flax's, with A and B beside the kernel.

The base class computes the layer and the op of its kind adds the update, so the layer
is bitwise equal to its base until A and B are trained. `lora_jax.nnx.adapt` makes the
same classes of a model's layers, and subclasses like them of other libraries' layers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from lora_jax.array_types import AnyFloat, PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import ADAPTER_LEAVES, BIAS, DROPOUT, PARAMS
from lora_jax.nn.base import check_no_tokens
from lora_jax.nnx.exactness import checked
from lora_jax.nnx.factors import STREAM, LayerLoRA, add_lora, site_of
from lora_jax.nnx.rules import HEAD_METHODS, Rule, rule_of
from lora_jax.ops.embed import dora_query
from lora_jax.ops.factors import Factors
from lora_jax.tree.targets import LINEAR_KINDS, as_target


class LoRALayer(nnx.Module):
    """Mixin of a layer with LoRA; inherited before the layer's class.

    Attributes:
      lora: the layer's settings, or None where the config doesn't target it.
      deterministic: disables adapter dropout; set by ``model.eval()``. Absent without
        adapter dropout.

    Variables: those of the layer, and beside its kernel ``lora_a``, ``lora_b`` and with
    DoRA ``magnitude`` (`flax.nnx.LoRAParam`); what a method doesn't train is a
    `FixedParam`.
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

    @functools.wraps(getattr(base, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> AnyFloat:
        if self.lora is None:
            return getattr(base, name)(self, *args, **kwargs)
        return call_adapted(self, base, name, args, kwargs)

    return method


def call_adapted(
    layer: Any,
    base: type,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hidden: AnyFloat | None = None,
) -> AnyFloat:
    """Calls a method of an adapted layer.

    Args:
      layer: the layer.
      base: its class before it was adapted.
      name: name of the method.
      args: its arguments.
      kwargs: its keyword arguments.
      hidden: ``dropout(x) A`` if it was computed for several layers.

    Returns:
      The method's result, with the update.
    """
    original: Callable[..., Any] = getattr(base, name)
    rule = layer_rule(layer)
    bound = inspect.signature(original).bind(layer, *args, **kwargs)
    _, *inputs = bound.args
    weight = getattr(layer, rule.weight)
    kernel = jnp.asarray(weight[...])
    a, b, m = plain_factors(layer)[:3]
    options: dict[str, Any] = {"scaling": layer.lora.scaling}
    if m is not None and name in HEAD_METHODS:
        inputs[0] = dora_query(jnp.asarray(inputs[0]), kernel, a, b, m, **options)
    elif m is not None:
        options["magnitude"] = m
        if (bias := _value(layer, BIAS)) is not None:
            options["bias"] = bias
    y = original(layer, *inputs, **bound.kwargs)
    if not isinstance(weight, nnx.LoRAParam):  # else the config trains it too
        y = check_frozen(f"{base.__name__}.{rule.weight}", y, kernel)
    options |= dropout_options(layer) if hidden is None else {"hidden": hidden}

    def update(inputs: list[Any], factors: tuple[Any, ...], options: dict) -> AnyFloat:
        return rule.apply(layer, name, tuple(inputs), *factors, **options)

    return on_auto_axes(update, y, inputs, (y, kernel, a, b), options)


def on_auto_axes(function: Callable[..., Any], like: PyTree, *args: Any) -> Any:
    """Calls a function that XLA shards inside, also on a mesh of explicit axes.

    Args:
      function: what to call.
      like: arrays with the shardings of its result.
      *args: its arguments, trees of arrays and other values.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function(*args)
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def run(arrays: dict[int, jax.Array]) -> Any:
        own = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(treedef, own))

    place = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, like)
    return jax.sharding.auto_axes(run, out_sharding=place)(arrays)


def plain_factors(layer: Any) -> Factors:
    """Returns A, B and m of an adapted layer; see `Factors.plain`."""
    stored = Factors(*(_value(layer, leaf) for leaf in ADAPTER_LEAVES))
    return stored.plain(layer_rule(layer).contraction(layer))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def check_frozen(name: str, y: AnyFloat, kernel: AnyFloat) -> AnyFloat:
    """Returns ``y``; raises if a gradient of W0 is taken, which would train the base.

    Args:
      name: the weight's, for the error.
      y: the output of the frozen layer.
      kernel: W0.
    """
    del name, kernel
    return y


def _checked(name: str, y: Any, kernel: Any) -> tuple[AnyFloat, None]:
    if kernel.perturbed:
        raise ValueError(
            f"the gradient of {name}, a frozen weight of an adapted layer, must not be "
            "taken: with `wrt=nnx.Param`, the default of `nnx.grad`, the base would be "
            "trained. Select what is trained: `nnx.DiffState(0, lora_jax.nnx.Trained)` "
            "for `nnx.grad`, and `wrt=lora_jax.nnx.Trained` for `nnx.Optimizer`. "
            "Weights of the base that are to be trained go into `LoRAConfig.train`."
        )
    return y.value, None


def _pass_on(name: str, residuals: None, dy: Any) -> tuple[Any, None]:
    del name, residuals
    return (None if isinstance(dy, SymbolicZero) else dy), None


check_frozen.defvjp(_checked, _pass_on, symbolic_zeros=True)


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
    """Raises unless ``lora`` is a `LoRAConfig`, without tokens."""
    if not isinstance(lora, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig; got {type(lora).__name__}.")
    check_no_tokens(lora)


def give_lora(layer: Any, config: LoRAConfig, path: str, rngs: nnx.Rngs) -> None:
    """Adds A and B to a new layer of a LoRA class, if the config targets its path."""
    rule = layer_rule(layer)
    layer.lora = None
    if not path or config.is_target(path, is_linear=rule.kind in LINEAR_KINDS):
        site = checked(site_of(path, layer, rule), layer, rule, {})
        target = as_target(site, config)
        kernel = getattr(layer, rule.weight)[...]
        values = target.init(rngs[PARAMS](), kernel, config.start)
        dropout_key = rngs[DROPOUT]() if config.dropout_rate else None
        add_lora(layer, target, config, values, dropout_key)


def dropout_options(layer: Any) -> dict[str, Any]:
    """Returns the rate of adapter dropout and a key, empty if it is off."""
    rate = layer.lora.config.dropout_rate
    if not rate or layer.deterministic:
        return {}
    if not hasattr(layer, STREAM):
        raise ValueError(
            f"dropout_rate={rate} of the adapter needs a random stream, and it was "
            "loaded without. Load it with `rngs=nnx.Rngs(seed)`."
        )
    return {"dropout_rate": rate, "dropout_key": getattr(layer, STREAM)()}


def _value(layer: Any, name: str) -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else jnp.asarray(variable[...])
