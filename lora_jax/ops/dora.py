"""DoRA: LoRA for the direction of each kernel column, and a trained magnitude.

``y = (m / n) (x W0 + scaling * (x A) B) + bias``, where ``n`` are the column norms of
``W0 + scaling * A B`` and ``m`` is trained, starting from the column norms of ``W0``.
DoRA thus scales each output of a LoRA layer by one number: the ops take ``m`` as
``magnitude`` and apply `rescale`. The gradient treats ``n`` as a constant (section 4.3
of the paper).

The norms never form the ``[i, o]`` product ``A B``::

    n² = ‖W0‖² + 2 s colsum((Aᵀ W0) ⊙ B) + s² colsum(B ⊙ ((Aᵀ A) B))

That costs ``r i o`` multiply-adds and two reads of W0 per call, compared with ``i o``
multiply-adds per token. ``‖W0‖²`` is recomputed on every call, so there is no cached
value to keep consistent with the base.
"""

import functools
import string

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.array_types import AnyFloat
from lora_jax.names import LINEAR
from lora_jax.ops.contraction import DENSE, Contraction, Shape, check_factors
from lora_jax.ops.merge import delta_kernel
from lora_jax.ops.product import check_floating


def rescale(y: AnyFloat, scale: AnyFloat, bias: AnyFloat | None = None) -> AnyFloat:
    """Scales a LoRA layer's output without its bias.

    Computes ``scale * (y - bias) + bias`` as ``y + (scale - 1) * (y - bias)``, which is
    bitwise ``y`` where the scale is 1, and has no cancellation error near 1. The
    arithmetic is in float32; the only residual is ``y``, in its own dtype.

    Args:
      y: output of the layer, with update and bias; sets the dtype of the result.
      scale: ``m / n``, broadcastable to ``y``.
      bias: the bias included in ``y``, broadcastable to ``y``, or None.
    """
    # A remat policy that saves layers' outputs saves this one too: the gradient of the
    # scale needs it, and would else compute the layer again.
    y = checkpoint_name(y, LINEAR)
    return _rescale(y, scale, None if bias is None else bias.astype(y.dtype))


@jax.checkpoint
def _rescale(y, scale, bias):
    wide = y.astype(jnp.promote_types(jnp.float32, y.dtype))
    scaled = wide if bias is None else wide - bias
    return (wide + (scale - 1) * scaled).astype(y.dtype)


def dora_scale(
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    magnitude: AnyFloat,
    *,
    scaling: float | jax.Array,
    contraction: Contraction = DENSE,
) -> AnyFloat:
    """Computes ``m / n``, differentiable with respect to ``m`` only.

    Args:
      kernel: ``W0``.
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      magnitude: ``m`` ``[*batch, *out]``.
      scaling: ``alpha / rank``.
      contraction: the kernel's axes.

    Returns:
      The scale ``[*batch, *out]``, float32 (float64 if the kernel is). It is 1 where
      ``B = 0`` and ``m`` is the `column_norm`, exactly so if both norms are compiled
      alike (not inside a scan); and 1 where ``n`` is 0, to avoid dividing by zero.

    Raises:
      ValueError: if the shapes are incompatible.
      TypeError: if an array is not floating.
    """
    check_floating(magnitude=magnitude)
    wanted = magnitude_shape(tuple(kernel.shape), contraction)
    if magnitude.shape != wanted:
        raise ValueError(
            f"magnitude must be [*batch, *out] = {list(wanted)} for a kernel of shape "
            f"{kernel.shape}; got {magnitude.shape}."
        )
    frozen = jax.lax.stop_gradient((kernel, lora_a, lora_b))
    norm = adapted_norm(*frozen, scaling=scaling, contraction=contraction)
    norm = checkpoint_name(norm, LINEAR)  # small, and two reads of W0 to recompute
    # The inner `where` also stops XLA from using `m * rsqrt(n²)`, not 1 for m = n.
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)


def magnitude_shape(kernel_shape: Shape, contraction: Contraction = DENSE) -> Shape:
    """Returns ``[*batch, *out]``, the shape of the magnitude of a kernel."""
    contraction.split(kernel_shape)  # validates
    return tuple(
        kernel_shape[axis] for axis in (*contraction.batch, *contraction.outputs)
    )


def column_norm(kernel: AnyFloat, contraction: Contraction = DENSE) -> AnyFloat:
    """Returns the norms of the kernel over its input axes: ``m`` at init.

    Args:
      kernel: ``W0``, in any floating dtype.
      contraction: the kernel's axes.

    Returns:
      The norms ``[*batch, *out]``, float32 (float64 if the kernel is).

    Example:
      >>> column_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]])).tolist()
      [5.0, 2.0]
    """
    return jnp.sqrt(_squares(kernel, contraction))


def adapted_norm(
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    contraction: Contraction = DENSE,
) -> AnyFloat:
    """Returns the norms of ``W0 + scaling * A B`` over its input axes.

    The product ``Aᵀ W0`` is in W0's dtype, everything else in float32. Bitwise equal to
    `column_norm` where ``B = 0``.

    Args:
      kernel: ``W0``.
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      scaling: ``alpha / rank``.
      contraction: the kernel's axes.

    Returns:
      The norms ``[*batch, *out]``, float32 (float64 if the kernel is).

    Raises:
      ValueError: if the shapes are incompatible.
      TypeError: if an array is not floating.
    """
    check_floating(kernel=kernel, lora_a=lora_a, lora_b=lora_b)
    check_factors(tuple(kernel.shape), lora_a.shape, lora_b.shape, contraction)
    squares = _squares(kernel, contraction)
    dtype, groups = squares.dtype, contraction.groups
    letters = string.ascii_lowercase[: kernel.ndim]
    batch, inputs, outputs = (
        "".join(letters[axis] for axis in axes) for axes in contraction[:3]
    )
    if groups > 1:  # [*k, i, o] -> [*k, i, g, o/g]
        (o,) = contraction.outputs
        shape = kernel.shape
        kernel = kernel.reshape(*shape[:o], groups, -1, *shape[o + 1 :])
        batch, letters = batch + "G", letters.replace(outputs, "G" + outputs)
    einsum = functools.partial(jnp.einsum, precision="highest")
    a, b = lora_a.astype(kernel.dtype), lora_b.astype(dtype)
    down = f"{batch}{inputs}R"
    # Output in W0's dtype too: XLA:CPU can't widen bfloat16 in a dot, and upcasting W0
    # would allocate the [i, o] temporary that this avoids.
    aw = einsum(f"{down},{letters}->{batch}R{outputs}", a, kernel).astype(dtype)
    a = a.astype(dtype)
    aa = einsum(f"{down},{batch}{inputs}S->{batch}RS", a, a)
    aab = einsum(f"{batch}RS,{batch}S{outputs}->{batch}R{outputs}", aa, b)
    change = jnp.sum(b * (scaling * (2 * aw + scaling * aab)), axis=len(batch))
    return jnp.sqrt(jnp.maximum(squares + change.reshape(squares.shape), 0))


@functools.partial(jax.jit, static_argnums=1)
def _squares(kernel: AnyFloat, contraction: Contraction) -> AnyFloat:
    """Returns the squared norms ``[*batch, *out]``; jitted for reproducible bits."""
    dtype = jnp.promote_types(jnp.float32, kernel.dtype)
    squares = jnp.sum(jnp.square(kernel.astype(dtype)), axis=contraction.inputs)
    roles = (*contraction.batch, *contraction.outputs)
    left = sorted(roles)
    return jnp.transpose(squares, [left.index(axis) for axis in roles])


def merge_dora(
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    magnitude: AnyFloat,
    *,
    scaling: float | jax.Array,
    contraction: Contraction = DENSE,
) -> AnyFloat:
    """Returns ``(m / n) * (W0 + scaling * A B)``: computed in float32, rounded once.

    The sum is in float64 if an array is.

    Args:
      kernel: ``W0``, in any floating dtype.
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      magnitude: ``m`` ``[*batch, *out]``.
      scaling: ``alpha / rank``.
      contraction: the kernel's axes.

    Returns:
      The merged kernel, in the dtype of ``kernel``.

    Raises:
      ValueError: if the shapes are incompatible.
      TypeError: if an array is not floating.

    Example:
      >>> w0, a, b = jnp.eye(2), jnp.zeros((2, 1)), jnp.zeros((1, 2))
      >>> merge_dora(w0, a, b, jnp.array([2.0, 3.0]), scaling=0.5).tolist()
      [[2.0, 0.0], [0.0, 3.0]]

    References:
      Liu et al., https://arxiv.org/abs/2402.09353, section 4.1.
    """
    factors = {"scaling": scaling, "contraction": contraction}
    scale = dora_scale(kernel, lora_a, lora_b, magnitude, **factors)
    delta = delta_kernel(lora_a, lora_b, kernel.shape, **factors)
    wide = jnp.promote_types(delta.dtype, kernel.dtype)
    merged = over_kernel(scale, contraction) * (kernel.astype(wide) + delta)
    return merged.astype(kernel.dtype)


def over_kernel(scale: AnyFloat, contraction: Contraction) -> AnyFloat:
    """Reshapes ``[*batch, *out]`` to the kernel's layout, with input axes of size 1."""
    layout = (*contraction.batch, *contraction.outputs, *contraction.inputs)
    scale = scale.reshape(*scale.shape, *(1 for _ in contraction.inputs))
    return jnp.transpose(scale, [layout.index(axis) for axis in range(len(layout))])
