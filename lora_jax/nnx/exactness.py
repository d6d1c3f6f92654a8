"""Numerical checks of NNX layers and of merged models, as on the Linen side."""

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.nn.exactness import (
    LARGEST,
    Drawing,
    compare_merged,
    floats,
    is_update_exact,
)
from lora_jax.nn.layer_rules import CALL, EXPERTS_KIND
from lora_jax.nnx.factors import OUT_SHARDING
from lora_jax.nnx.rules import HEAD_METHODS, Rule
from lora_jax.ops.contraction import Contraction
from lora_jax.tree.targets import Site

_FLAX = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed, nnx.Conv)
_REPLACEABLE = {  # attributes that replace a layer's product, and flax's own values
    **{"dot_general": jax.lax.dot_general, "dot_general_cls": None},
    "conv_general_dilated": jax.lax.conv_general_dilated,
}


def checked(site: Site, module: Any, rule: Rule, tried: dict[Any, bool]) -> Site:
    """Returns a site that says whether its layer multiplies by its weight as stored.

    Args:
      site: the description of a layer.
      module: the layer, without an adapter; also an abstract one.
      rule: its rule.
      tried: what was found for layers that compute alike; added to.

    Returns:
      The site; its `is_plain` is False for a layer of flax whose product is replaced by
      one that transforms the weight.

    Raises:
      ValueError: if the layer is not flax's and computes something else than its rule.
    """
    is_own_arithmetic = rule.is_guess or not isinstance(module, _FLAX)
    given = {name: getattr(module, name, None) for name in _REPLACEABLE}
    if not is_own_arithmetic and all(
        value in (None, _REPLACEABLE[name]) for name, value in given.items()
    ):
        return site
    equation = rule.equation and rule.equation(module)
    key = (type(module), equation, *given.values(), site.contraction, site.kernel_shape)
    if key not in tried:
        tried[key] = is_exact(module, site, rule)
    if is_own_arithmetic and not tried[key]:
        raise ValueError("its equation does not reproduce its output")
    return dataclasses.replace(site, is_plain=tried[key])


def is_exact(module: Any, site: Site, rule: Rule) -> bool:
    """Tests on random numbers whether merging A B into a layer equals its update.

    Args:
      module: a layer without an adapter, also an abstract one; only shapes are used.
      site: its description.
      rule: its rule.

    Returns:
      False if the outputs differ; True if not, or if the layer can't be called with one
      array. A guess must be seen to hold. Of a stack of layers, one is tested.
    """
    graphdef, state = nnx.split(module, graph=True)
    if site.scanned_a:
        site, state = _one_layer(site, state, rule.contraction(module))
    if sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(state)) > LARGEST:
        site, state = _small(site, state)
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw = Drawing()
        filled = jax.tree.map(draw, state)
        return all(
            _is_call_exact((graphdef, filled), site, rule, method, inputs)
            for method, inputs in _calls(module, site, rule)
        )


def _one_layer(site: Site, state: Any, contraction: Contraction) -> tuple[Site, Any]:
    """Returns one layer of a stack, whose leaves all have the stack's axes."""
    axes = {axis: site.kernel_shape[axis] for axis in site.scanned_a}

    def single(leaf: Any) -> Any:
        shape = getattr(leaf, "shape", ())
        sizes = [shape[axis] for axis in axes if axis < len(shape)]
        if sizes != [*axes.values()]:
            return leaf
        own = tuple(n for axis, n in enumerate(shape) if axis not in axes)
        return jax.ShapeDtypeStruct(own, leaf.dtype)

    kernel_shape = single(jax.ShapeDtypeStruct(site.kernel_shape, jnp.float32)).shape
    whole = (site.path, site.kind, site.weight, kernel_shape, contraction)
    return Site(*whole), jax.tree.map(single, state)


def _small(site: Site, state: Any) -> tuple[Site, Any]:
    """Returns the same layer with small sizes: equal ones stay equal."""
    small = {n: 4 + place for place, n in enumerate(dict.fromkeys(site.kernel_shape))}

    def shrunk(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        shape = tuple(small.get(size, size) for size in leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    kernel_shape = tuple(small[size] for size in site.kernel_shape)
    site = dataclasses.replace(site, kernel_shape=kernel_shape)
    return site, jax.tree.map(shrunk, state)


def _is_call_exact(
    split: tuple[Any, Any], site: Site, rule: Rule, method: str, inputs: tuple[Any, ...]
) -> bool:
    def alone(weight: Any) -> Any:
        layer: Any = nnx.merge(*split, copy=True)
        getattr(layer, rule.weight).set_value(weight)
        return layer

    done = []

    def call(weight: Any) -> Any:
        function = getattr(alone(weight), method)
        names = {OUT_SHARDING} & {*inspect.signature(function).parameters}
        y = function(*inputs, **dict.fromkeys(names))  # Bonsai's layers require it
        done.append(method)
        return y

    def adapt(before: Any, kernel: Any, a: Any, b: Any) -> Any:
        factors = (kernel, a, b)
        layer = alone(kernel)
        return rule.apply(layer, method, inputs, before, *factors, scaling=1.0)

    shape = site.kernel_shape
    exact = is_update_exact(call, adapt, shape, site.contraction, Drawing())
    return exact and (bool(done) or not rule.is_guess)


def _calls(module: Any, site: Site, rule: Rule) -> Iterator[tuple[str, tuple]]:
    """Yields the methods of a layer with arrays that they may be called with."""
    batch, inputs, outputs = site.contraction.split(site.kernel_shape)
    draw = Drawing()
    if rule.kind == "embed":
        for method in rule.methods:
            is_head = method in HEAD_METHODS
            ids = jnp.arange(6).reshape(2, 3) % inputs[0]
            yield method, (draw.normal((2, *outputs)) if is_head else ids,)
    elif rule.kind == EXPERTS_KIND and rule.equation is None:
        sizes = jnp.arange(batch[0]) % 3
        yield CALL, (draw.normal((int(sizes.sum()), *inputs)), sizes)
    elif rule.kind == "conv":
        window = [size + 3 for size in inputs[:-1]]
        channels = inputs[-1] * site.contraction.groups
        yield CALL, (draw.normal((2, *window, channels)),)
    elif rule.equation is not None:
        x, kernel = rule.equation(module).replace(" ", "").split("->")[0].split(",")
        axes = dict(zip(kernel.replace("...", ""), site.kernel_shape, strict=True))
        free = [label for label in x if label not in (*axes, ".")]
        axes |= {label: 2 + place % 3 for place, label in enumerate(free)}
        shape = [axes[label] for label in x.replace("...", "")]
        yield CALL, (draw.normal((2, 3) * x.startswith("...") + tuple(shape)),)
    elif not batch:
        yield CALL, (draw.normal((2, 3, *inputs)),)


def check_merged(adapted: Any, base: Any, merged: Any, inputs: tuple[tuple, dict]):
    """Raises unless a merged model computes the outputs of the adapted one.

    Args:
      adapted: the model with adapters.
      base: the plain model without them.
      merged: the plain model with merged kernels.
      inputs: arguments and keyword arguments of a call.

    Raises:
      ValueError: if the outputs differ by far more than rounding.
    """
    args, kwargs = inputs

    def outputs(model: Any) -> list[jax.Array]:
        graphdef, state = nnx.split(model, graph=True)

        @jax.jit
        def run(state, args, kwargs):
            copy: Any = nnx.merge(graphdef, state, copy=True)
            copy.eval()
            return floats(copy(*args, **kwargs))

        return run(state, args, kwargs)

    wanted, got, before = map(outputs, (adapted, merged, base))
    types = {x.dtype.name for x in (*wanted, *floats(nnx.state(base, nnx.Param)))}
    is_wide = types <= {"float32", "float64"}
    compare_merged(wanted, got, before, is_wide=is_wide)
