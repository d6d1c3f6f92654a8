"""LoRA on experts: every row is multiplied by the matrix of its own expert.

``y[j] = x[j] W0[e] + scaling * (x[j] A[e]) B[e]`` for rows sorted by expert, where
``e`` is the expert of row ``j``. Each expert has its own A and B. No row is padded or
dropped, and the update costs ``r * (i + o)`` multiply-adds per row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from lora_jax.array_types import AnyFloat, DropoutKey
from lora_jax.names import X_A
from lora_jax.ops.contraction import Contraction, check_factors
from lora_jax.ops.dora import dora_scale, rescale
from lora_jax.ops.grouped import grouped_dot, grouped_outer
from lora_jax.ops.product import check_dropout, check_floating, dropout, scale

EXPERTS = Contraction(batch=(0,), inputs=(1,), outputs=(2,))  # of a kernel [e, i, o]


def lora_experts(
    x: Float[Array, "*p m i"],
    kernel: Float[Array, "e i o"],
    lora_a: Float[Array, "e i r"],
    lora_b: Float[Array, "e r o"],
    sizes: Int[Array, "*p _"],
    *,
    scaling: float | jax.Array,
    bias: Float[Array, "e o"] | None = None,
    magnitude: Float[Array, "e o"] | None = None,
    base_output: Float[Array, "*p m o"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*p m o"]:
    """Applies frozen experts plus the low-rank update of each.

    Computes ``y[j] = x[j] @ W0[e] + bias[e] + scaling * (dropout(x[j]) @ A[e]) @ B[e]``
    for rows sorted by their expert ``e``; `lora_jax.ops.grouped_lowerings` has each
    platform's implementation. The gradient of ``kernel`` is formed only if the caller
    differentiates with respect to it.

    Args:
      x: rows ``[m, i]``, those of expert 0 first, then those of expert 1, ...; sets
        the dtype of the computation and of the result.
      kernel: frozen base weights ``W0`` ``[e, i, o]``.
      lora_a: ``A`` ``[e, i, r]``.
      lora_b: ``B`` ``[e, r, o]``.
      sizes: rows of each expert ``[e]``; rows beyond their sum get zero. On a mesh
        ``[s, c, e / c]``, and ``x`` is ``[s, c, m, i]``; if c is 1, every row must
        have an expert. See `lora_jax.ops.grouped`.
      scaling: ``alpha / rank``.
      bias: frozen base biases ``[e, o]``, or None.
      magnitude: DoRA's ``m`` ``[e, o]``, or None; see `lora_dense`.
      base_output: the frozen experts' output ``[m, o]``, bias included, if already
        computed; sets the dtype of the result.
      dropout_rate: probability of dropping an element of the update's input.
      dropout_key: PRNG key, required if ``dropout_rate`` is above 0.
      precision: as in `jax.lax.dot_general`.

    Returns:
      Outputs ``[m, o]``, in the dtype of ``x`` (of ``base_output`` if it is given).

    Raises:
      ValueError: if the shapes are incompatible, or the dropout rate is outside [0, 1]
        or lacks a key.
      TypeError: if an array is not floating, or ``sizes`` are not integers.

    Example:
      >>> x, w0 = jnp.ones((3, 2)), jnp.ones((2, 2, 4))
      >>> a, b = jnp.ones((2, 2, 1)), jnp.arange(2.0)[:, None, None] * jnp.ones((1, 4))
      >>> lora_experts(x, w0, a, b, jnp.array([1, 2]), scaling=0.5)[:, 0].tolist()
      [2.0, 3.0, 3.0]

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1.
    """
    check_floating(x=x, kernel=kernel, lora_a=lora_a, lora_b=lora_b, bias=bias)
    check_experts(x, kernel, sizes)
    check_factors(kernel.shape, lora_a.shape, lora_b.shape, EXPERTS)
    key = check_dropout(dropout_rate, dropout_key)
    y: Any = base_output
    if y is None:
        y = expert_product(0.0, precision, x, kernel, sizes)
        y = y if bias is None else y + of_rows(bias, sizes, x.shape[-2]).astype(y.dtype)
    x = x.astype(y.dtype)
    h: Any = expert_product(dropout_rate, precision, x, lora_a, sizes, key)
    h = checkpoint_name(scale(h, scaling), X_A)  # [m, r]
    y += expert_product(0.0, precision, h, lora_b, sizes)
    if magnitude is None:
        return y
    m_over_n = dora_scale(
        kernel, lora_a, lora_b, magnitude, scaling=scaling, contraction=EXPERTS
    )
    biases = None if bias is None else of_rows(bias, sizes, x.shape[-2])
    return rescale(y, of_rows(m_over_n, sizes, x.shape[-2]), biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_product(
    rate: float,
    precision: jax.lax.PrecisionLike,
    x: AnyFloat,
    factor: AnyFloat,
    sizes: Array,
    key: DropoutKey | None = None,
    stack: Any = None,
) -> AnyFloat:
    """Computes ``dropout(x)[j] F[e]`` for rows sorted by expert.

    The backward pass forms the gradient of ``F`` only if it is wanted, regenerates the
    dropout mask from its key, and keeps ``x`` only if it needs it.

    Args:
      rate: probability of dropping an element of ``x``.
      precision: as in `jax.lax.dot_general`.
      x: rows ``[m, i]``.
      factor: ``F`` ``[e, i, o]``: W0, A or B; cast to the dtype of ``x``.
      sizes: rows of each expert ``[e]``.
      key: PRNG key for dropout; None if the rate is 0.
      stack: where ``F`` is read: several layers' ``[l, e, i, o]``, and the number of
        its own; or None. The whole gradient goes to ``factor``, a slice of the stack,
        as the gradient of a stack would be another one.

    Returns:
      ``[m, o]``, in the dtype of ``x``.
    """
    matrices, layer = (factor, None) if stack is None else stack
    x, options = dropout(x, rate, key), {"precision": precision, "layer": layer}
    return grouped_dot(x, matrices, sizes, **options)


def _forward(rate, precision, x, factor, sizes, key=None, stack=None):
    sizes, key, stack = jax.tree.map(
        lambda leaf: leaf.value, (sizes, key, stack), is_leaf=_is_primal
    )
    pair = (factor.value, None) if stack is None else stack
    options = {"precision": precision, "layer": pair[1]}
    y = grouped_dot(dropout(x.value, rate, key), pair[0], sizes, **options)
    rows = x.value if factor.perturbed else None
    like = jnp.zeros(0, factor.value.dtype)
    return y, (rows, pair if x.perturbed else None, like, sizes, key)


def _is_primal(leaf) -> bool:
    return hasattr(leaf, "perturbed")


def _backward(rate, precision, residuals, dy):
    x, pair, like, sizes, key = residuals
    none = None, None, None
    if isinstance(dy, SymbolicZero):
        return None, None, *none
    dx = d_factor = None
    if pair is not None:
        matrices, layer = pair
        options = {"precision": precision, "layer": layer}
        dx = grouped_dot(dy, matrices, sizes, is_transposed=True, **options)
        dx = dropout(dx, rate, key)
    if x is not None:
        d_factor = grouped_outer(
            dropout(x, rate, key), dy, sizes, like.dtype, precision
        )
    return dx, d_factor, *none


expert_product.defvjp(_forward, _backward, symbolic_zeros=True)


def of_rows(
    per_expert: Float[Array, "e o"], sizes: Int[Array, "*p _"], rows: int
) -> Float[Array, "*p m o"]:
    """Returns what each row's expert has.

    Args:
      per_expert: one row an expert ``[e, o]``.
      sizes: rows of each expert ``[e]``, or ``[s, c, e / c]``.
      rows: ``m``.

    Returns:
      ``[m, o]`` or ``[s, c, m, o]``; zero beyond the experts' rows.
    """
    ends = jnp.cumsum(sizes, axis=-1)[..., None, :]
    expert = jnp.sum(jnp.arange(rows)[:, None] >= ends, axis=-1)  # [*p, m]
    own = sizes.shape[-1]
    if sizes.ndim > 1:
        first = own * jnp.arange(sizes.shape[-2])[:, None]
        expert = jnp.where(expert < own, expert + first, len(per_expert))
    return per_expert.at[expert].get(mode="fill", fill_value=0)


def check_experts(x: AnyFloat, kernel: AnyFloat, sizes: Array) -> None:
    """Raises unless rows, kernel and sizes fit.

    Args:
      x: expected ``[m, i]``.
      kernel: expected ``[e, i, o]``.
      sizes: expected ``[e]``, integers.

    Raises:
      ValueError: with the expected and actual shapes.
      TypeError: if ``sizes`` are not integers.
    """
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"sizes must be integers; got {sizes.dtype}.")
    is_fitting = kernel.ndim == 3 and x.ndim in (2, 4) and sizes.ndim == x.ndim - 1
    if is_fitting:
        *parts, own = sizes.shape
        groups = own * (parts[1] if parts else 1)
        wanted = (*parts, x.shape[-2], kernel.shape[1])
        is_fitting = groups == kernel.shape[0] and x.shape == wanted
    if not is_fitting:
        raise ValueError(
            "x, kernel, sizes must be [m, in], [experts, in, out], [experts]; got "
            f"{x.shape}, {kernel.shape}, {sizes.shape}. Sort the rows by expert and "
            "count those of each."
        )
