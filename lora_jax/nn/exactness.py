"""Does changing a layer's kernel by A B change its output by the adapter's update?

Linen's own layers are linear in their kernel, and there it does. A layer that
transforms its kernel before use (a standardised convolution, a rounding
``dot_general``) or whose registered equation is wrong is not, and no shape tells. So
such a layer is tried alone, on random numbers, when a model is traced; and a whole
model when adapters are merged.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.names import DROPOUT, PARAMS
from lora_jax.nn.layer_rules import CALL, LayerRule
from lora_jax.ops.merge import delta_kernel

_LINEN = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed, nn.Conv)
_REPLACEABLE = (  # attributes by which a user's own product takes the place of JAX's
    *("dot_general", "dot_general_cls"),
    *("conv_general_dilated", "conv_general_dilated_cls"),
)
_LARGEST = 2**24  # elements of a layer that is tried; above, merging is what tells
_TOLERANCE = {"float64": 1e-2, "float32": 2e-2}  # of the update; else:
_COARSE = 6e-2


def is_own_arithmetic(module: nn.Module) -> bool:
    """Says whether a layer multiplies by its kernel in code that is not Linen's."""
    return not isinstance(module, _LINEN)


def may_be_inexact(module: nn.Module) -> bool:
    """Says whether a layer may use another kernel than the one that is stored."""
    return (
        is_own_arithmetic(module)
        or type(module).param is not nn.Module.param
        or any(getattr(module, name, None) is not None for name in _REPLACEABLE)
    )


def is_exact(
    module: nn.Module, rule: LayerRule, method: str, inputs: tuple[Any, ...]
) -> bool:
    """Tries one layer: whether merging A B changes its output by the update.

    Args:
      module: bound; arrays of its variables and inputs may be tracers, for their shapes
        alone are looked at.
      rule: of its type.
      method: that was called.
      inputs: of that call.

    Returns:
      False if the layer is found to differ; True if not, or if it is too large to be
      tried or can't be called alone.
    """
    shapes = nn.meta.unbox(dict(module.variables))
    kernel_shape = tuple(jnp.shape(shapes.get(PARAMS, {}).get(rule.weight)))
    if sum(map(jnp.size, jax.tree.leaves(shapes))) > _LARGEST or not kernel_shape:
        return True
    contraction = rule.contraction(module, *(inputs if method == CALL else ()))
    a_shape, b_shape = contraction.factor_shapes(kernel_shape, 2)
    draw = _Drawing()
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variables = jax.tree.map(draw, shapes)
        arguments = jax.tree.map(draw, inputs)
        fan_in, _ = contraction.matrix_size(kernel_shape)
        kernel = draw.normal(kernel_shape) / np.sqrt(fan_in)
        a, b = draw.normal(a_shape) / np.sqrt(fan_in), draw.normal(b_shape)
        delta = delta_kernel(a, b, kernel_shape, scaling=1.0, contraction=contraction)
        alone = module.clone(parent=None, name=None)

        def call(weight: Any) -> Any:
            own = {**variables[PARAMS], rule.weight: weight}
            everything = {**variables, PARAMS: own}
            return alone.apply(everything, *arguments, method=method)

        try:
            before, after = call(kernel), call(kernel + delta)
        except Exception:  # whatever a layer that needs its model provokes
            return True
        try:
            adapted = rule.apply(
                alone, method, arguments, before, kernel, a, b, scaling=1.0
            )
        except (TypeError, ValueError):
            return False
        if jnp.shape(adapted) != jnp.shape(after):
            return False
        update = np.asarray(adapted - before, np.float64)
        error = np.abs(np.asarray(after - adapted, np.float64)).max(initial=0)
        tolerance = _TOLERANCE.get(jnp.asarray(before).dtype.name, _COARSE)
        return bool(error <= tolerance * max(np.abs(update).max(initial=0), 1e-6))


class _Drawing:
    """Fixed random arrays in the shapes of others."""

    def __init__(self):
        self._generator = np.random.default_rng(0)

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(self._generator.normal(size=shape), jnp.float32)

    def __call__(self, leaf: Any) -> Any:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return self.normal(leaf.shape).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        return (
            jnp.asarray(np.arange(np.prod(leaf.shape, dtype=int)) % 2)
            .reshape(leaf.shape)
            .astype(leaf.dtype)
        )


def is_concrete(tree: Any) -> bool:
    """Says whether all leaves are arrays with values: no tracers, no shapes."""
    leaves = jax.tree.leaves(tree)
    kinds = (jax.Array, np.ndarray)
    return all(
        isinstance(leaf, kinds) and not isinstance(leaf, Tracer) for leaf in leaves
    )


def check_merged(
    adapted: tuple[nn.Module, Mapping[str, Any]],
    plain: tuple[nn.Module, Mapping[str, Any], Mapping[str, Any]],
    others: Mapping[str, Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    method: Any,
) -> None:
    """Raises unless a merged model computes what the adapted one does.

    Args:
      adapted: the model with its adapters, deterministic, and its variables.
      plain: the plain model, its variables before merging and after.
      others: shapes of the collections that both have besides.
      inputs: arguments and keyword arguments of one example; of arrays only shapes and
        dtypes are looked at.
      method: that the example is for.

    Raises:
      ValueError: if the outputs differ by far more than rounding.

    Warns:
      UserWarning: if the example does not run.
    """
    draw = _Drawing()
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
            return _floats(outputs)

        return jax.jit(run)

    module, variables = adapted
    plain_module, base, merged = plain
    try:
        wanted, run_plain = compiled(module)(variables), compiled(plain_module)
        got, before = run_plain(merged), run_plain(base)
    except Exception as error:  # whatever random numbers provoke
        warnings.warn(
            "the merged model could not be compared with the adapted one, for the "
            f"example made from its inputs' shapes does not run: {error!r:.300}",
            stacklevel=3,
        )
        return
    types = {x.dtype.name for x in (*wanted, *jax.tree.leaves(base))}
    is_wide = types <= {"float32", "float64", *(t for t in types if "int" in t)}
    rounding = 1e-3 if is_wide else 5e-2
    for w, g, b in zip(wanted, got, before, strict=True):
        w, g, b = (np.asarray(x, np.float64) for x in (w, g, b))
        error, effect = np.abs(w - g).max(initial=0), np.abs(w - b).max(initial=0)
        if error > 0.1 * effect + rounding * np.abs(w).max(initial=0):
            raise ValueError(
                "the merged model does not compute what the adapted one does: on an "
                f"example its output is off by {error:.3g}, where the adapters change "
                f"it by {effect:.3g}. An adapted weight is also read directly (a tied "
                "head written as `x @ embedding.T`, say) or transformed before use, "
                "and a merged weight can't stand for that. Use the model unmerged, "
                "leave that layer out, or pass check=False."
            )


def _floats(outputs: Any) -> list[jax.Array]:
    return [
        leaf
        for leaf in jax.tree.leaves(outputs)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
