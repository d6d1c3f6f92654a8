"""Merging an adapter into its kernel: ``W = W0 + scaling * A B``."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_jax.array_types import AnyFloat
from lora_jax.ops.contraction import DENSE, Contraction, Shape, check_factors
from lora_jax.ops.product import check_floating


def delta_kernel(
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    kernel_shape: Shape,
    *,
    scaling: float | jax.Array,
    contraction: Contraction = DENSE,
) -> AnyFloat:
    """Computes ``scaling * A B`` in the kernel's layout, in float32.

    Args:
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      kernel_shape: shape of ``W0``, and of the result.
      scaling: ``alpha / rank``.
      contraction: the kernel's axes.

    Returns:
      The change to the kernel, float32 (float64 if A or B is).

    Raises:
      ValueError: if the shapes are incompatible.
      TypeError: if an array is not floating.
    """
    check_floating(lora_a=lora_a, lora_b=lora_b)
    check_factors(tuple(kernel_shape), lora_a.shape, lora_b.shape, contraction)
    batch, inputs, outputs = contraction.split(tuple(kernel_shape))
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(lora_a, lora_b))
    a = lora_a.astype(dtype).reshape(*batch, math.prod(inputs), -1)  # [*batch, i, r]
    b = lora_b.astype(dtype).reshape(*batch, -1, math.prod(outputs))  # [*batch, r, o]
    delta = jnp.matmul(a, b, precision="highest") * scaling  # [*batch, i, o]
    delta = delta.reshape(*batch, *inputs, *outputs)
    if contraction.groups > 1:  # [*batch, g, *in, o/g] -> [*batch, *in, o]
        group_axis = len(contraction.batch)
        delta = jnp.moveaxis(delta, group_axis, -2)
        delta = delta.reshape(*delta.shape[:-2], -1)
    layout = (*contraction.batch, *contraction.inputs, *contraction.outputs)
    return jnp.transpose(delta, [layout.index(axis) for axis in range(len(layout))])


def merge_kernel(
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    contraction: Contraction = DENSE,
) -> AnyFloat:
    """Returns ``W0 + scaling * A B``: computed in float32, rounded once.

    The sum is in float64 if any array is. Works under `jax.jit`, but without the NaN
    check.

    Args:
      kernel: ``W0``, in any floating dtype.
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      scaling: ``alpha / rank``.
      contraction: the kernel's axes; for other layers see
        `lora_jax.ops.einsum.parse_equation` and `lora_jax.ops.conv.conv_contraction`.

    Returns:
      The merged kernel, in the dtype of ``kernel``.

    Raises:
      ValueError: if the shapes are incompatible, or the result has a NaN or infinity.
      TypeError: if an array is not floating.

    Example:
      >>> w0, a, b = jnp.zeros((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2))
      >>> merge_kernel(w0, a, b, scaling=0.5).tolist()
      [[0.5, 0.5], [0.5, 0.5]]

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1, "No Additional
      Inference Latency".
    """
    merged = add_delta(kernel, lora_a, lora_b, scaling=scaling, contraction=contraction)
    if not is_finite(merged):
        arrays = {"kernel": kernel, "lora_a": lora_a, "lora_b": lora_b}
        wrong = [name for name, array in arrays.items() if not is_finite(array)]
        raise ValueError(
            "the merged kernel must be finite; it contains NaN or infinity, from "
            f"{', '.join(wrong) or f'a sum too large for {kernel.dtype}'}."
        )
    return merged


def add_delta(
    kernel: AnyFloat, lora_a: AnyFloat, lora_b: AnyFloat, **options: Any
) -> AnyFloat:
    """Merges like `merge_kernel`, without the NaN check."""
    check_floating(kernel=kernel)
    delta = delta_kernel(lora_a, lora_b, kernel.shape, **options)
    wide = jnp.promote_types(delta.dtype, kernel.dtype)
    return (kernel.astype(wide) + delta).astype(kernel.dtype)


def is_finite(array: Any) -> bool:
    """Returns whether all values are finite; always True for a tracer."""
    return isinstance(array, Tracer) or bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
