"""Numerical checks that an adapter is equivalent to changing the kernel by A B.

Linen's own layers are linear in their kernel, so it is. It is not for a layer that
transforms its kernel before use (a standardised convolution, a rounding
``dot_general``) or whose registered equation is wrong, which shapes can't reveal. Such
layers are tested in isolation on random numbers when a model is traced, and the whole
model is tested when adapters are merged.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.names import DROPOUT, PARAMS
from lora_jax.nn.layer_rules import CALL, LayerRule
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.merge import delta_kernel

_LINEN = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed, nn.Conv)
_REPLACEABLE = (  # attributes that replace the layer's product with a user's
    *("dot_general", "dot_general_cls"),
    *("conv_general_dilated", "conv_general_dilated_cls"),
)
LARGEST = 2**24  # layers with more elements are checked only when merging
_TOLERANCE = {"float64": 1e-2, "float32": 2e-2}  # relative to the update; else:
_COARSE = 6e-2


def is_own_arithmetic(module: nn.Module) -> bool:
    """Returns whether the layer's product is computed by code outside Linen."""
    return not isinstance(module, _LINEN)


def may_be_inexact(module: nn.Module) -> bool:
    """Returns whether a layer may transform its stored kernel before use."""
    return (
        is_own_arithmetic(module)
        or type(module).param is not nn.Module.param
        or any(getattr(module, name, None) is not None for name in _REPLACEABLE)
    )


def is_exact(
    module: nn.Module, rule: LayerRule, method: str, inputs: tuple[Any, ...]
) -> bool:
    """Tests on random numbers whether merging A B into one layer equals its update.

    Args:
      module: a bound module; its variables and inputs may be tracers, since only shapes
        are used.
      rule: the rule of its type.
      method: the called method.
      inputs: the arguments of the call.

    Returns:
      False if the outputs differ; True if not, or if the layer is too large to test or
      can't be called in isolation.
    """
    shapes = nn.meta.unbox(dict(module.variables))
    kernel_shape = tuple(jnp.shape(shapes.get(PARAMS, {}).get(rule.weight)))
    if sum(map(jnp.size, jax.tree.leaves(shapes))) > LARGEST or not kernel_shape:
        return True
    contraction = rule.contraction(module, *(inputs if method == CALL else ()))
    draw = Drawing()
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variables = jax.tree.map(draw, shapes)
        arguments = jax.tree.map(draw, inputs)
        alone = module.clone(parent=None, name=None)

        def call(weight: Any) -> Any:
            own = {**variables[PARAMS], rule.weight: weight}
            everything = {**variables, PARAMS: own}
            return alone.apply(everything, *arguments, method=method)

        def adapt(before: Any, kernel: Any, a: Any, b: Any) -> Any:
            factors = (kernel, a, b)
            return rule.apply(alone, method, arguments, before, *factors, scaling=1.0)

        return is_update_exact(call, adapt, kernel_shape, contraction, draw)


def is_update_exact(
    call: Callable[[Any], Any],
    adapt: Callable[[Any, Any, Any, Any], Any],
    kernel_shape: tuple[int, ...],
    contraction: Contraction,
    draw: "Drawing",
) -> bool:
    """Tests on random numbers whether a call with W0 + A B equals the adapted call.

    Args:
      call: ``kernel -> y``, the layer.
      adapt: ``(y, kernel, lora_a, lora_b) -> y'``, its op.
      kernel_shape: shape of the kernel.
      contraction: roles of its axes.
      draw: makes the numbers.

    Returns:
      False if the outputs differ or the op refuses; True if not, or if the layer can't
      be called.
    """
    a_shape, b_shape = contraction.factor_shapes(kernel_shape, 2)
    fan_in, _ = contraction.matrix_size(kernel_shape)
    kernel = draw.normal(kernel_shape) / np.sqrt(fan_in)
    a, b = draw.normal(a_shape) / np.sqrt(fan_in), draw.normal(b_shape)
    delta = delta_kernel(a, b, kernel_shape, scaling=1.0, contraction=contraction)
    try:
        before, after = call(kernel), call(kernel + delta)
    except Exception:  # the layer can't run outside its model
        return True
    try:
        adapted = adapt(before, kernel, a, b)
    except (TypeError, ValueError):
        return False
    if jnp.shape(adapted) != jnp.shape(after):
        return False
    update = np.asarray(adapted - before, np.float64)
    error = np.abs(np.asarray(after - adapted, np.float64)).max(initial=0)
    tolerance = _TOLERANCE.get(jnp.asarray(before).dtype.name, _COARSE)
    return bool(error <= tolerance * max(np.abs(update).max(initial=0), 1e-6))


class Drawing:
    """Draws deterministic random arrays with given shapes."""

    def __init__(self):
        self._generator = np.random.default_rng(0)

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns normal values in float32."""
        return jnp.asarray(self._generator.normal(size=shape), jnp.float32)

    def __call__(self, leaf: Any) -> Any:
        """Returns values like ``leaf``; what is not an array as it is."""
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return self.normal(leaf.shape).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        alternating = np.arange(np.prod(leaf.shape, dtype=int)) % 2
        return jnp.asarray(alternating).reshape(leaf.shape).astype(leaf.dtype)


def is_concrete(tree: Any) -> bool:
    """Returns whether all leaves are concrete arrays: no tracers, no shapes."""
    return all(
        isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, Tracer)
        for leaf in jax.tree.leaves(tree)
    )


def check_merged(
    adapted: tuple[nn.Module, Mapping[str, Any]],
    plain: tuple[nn.Module, Mapping[str, Any], Mapping[str, Any]],
    others: Mapping[str, Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    method: Any,
) -> None:
    """Raises unless a merged model computes the same outputs as the adapted one.

    Args:
      adapted: the model with its adapters, deterministic, and its variables.
      plain: the plain model, and its variables before and after merging.
      others: shapes of the other collections of both models.
      inputs: arguments and keyword arguments of an example; only the shapes and dtypes
        of arrays are used.
      method: the method the example is for.

    Raises:
      ValueError: if the outputs differ by far more than rounding.

    Warns:
      UserWarning: if the example does not run.
    """
    draw = Drawing()
    args, kwargs = jax.tree.map(draw, inputs)
    kept = {name: tree for name, tree in others.items() if name != "cache"}
    kept = jax.tree.map(draw, kept)

    def compiled(module: nn.Module) -> Any:
        def run(variables: Mapping[str, Any]) -> list[jax.Array]:
            outputs, _ = module.apply(
                {**kept, **variables},
                *args,
                method=method,
                mutable=[*others],
                rngs={DROPOUT: jax.random.key(0)},
                **kwargs,
            )
            return floats(outputs)

        return jax.jit(run)

    module, variables = adapted
    plain_module, base, merged = plain
    try:
        wanted, run_plain = compiled(module)(variables), compiled(plain_module)
        got, before = run_plain(merged), run_plain(base)
    except Exception as error:  # random inputs may be invalid for the model
        warnings.warn(
            "the merged model could not be compared with the adapted one: random "
            f"inputs of the example's shapes do not run: {error!r:.300}",
            stacklevel=3,
        )
        return
    types = {x.dtype.name for x in (*wanted, *jax.tree.leaves(base))}
    is_wide = all(t in ("float32", "float64") or "int" in t for t in types)
    compare_merged(wanted, got, before, is_wide=is_wide)


def compare_merged(
    wanted: Sequence[Any], got: Sequence[Any], before: Sequence[Any], *, is_wide: bool
) -> None:
    """Raises if a merged model's outputs are off by far more than rounding.

    Args:
      wanted: outputs of the adapted model.
      got: those of the merged one.
      before: those of the base.
      is_wide: whether all was computed in float32.

    Raises:
      ValueError: with the error, and the effect of the adapters.
    """
    rounding = 1e-3 if is_wide else 5e-2
    for w, g, b in zip(wanted, got, before, strict=True):
        w, g, b = (np.asarray(x, np.float64) for x in (w, g, b))
        error, effect = np.abs(w - g).max(initial=0), np.abs(w - b).max(initial=0)
        if error > 0.1 * effect + rounding * np.abs(w).max(initial=0):
            raise ValueError(
                "the merged model differs from the adapted one: on an example its "
                f"output is off by {error:.3g}, where the adapters change it by "
                f"{effect:.3g}. An adapted weight is also read directly (e.g. a tied "
                "head written as `x @ embedding.T`) or transformed before use, which a "
                "merged weight can't reproduce. Use the model unmerged, exclude that "
                "layer, or merge without this check (check=False, or no example)."
            )


def floats(outputs: Any) -> list[jax.Array]:
    """Returns the floating-point arrays of a tree."""
    return [
        leaf
        for leaf in jax.tree.leaves(outputs)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
