"""Multiplication by A or B, with a custom VJP.

The update ``(x A) B`` is two products, each with one thin side: the rank. Autodiff may
transpose either operand in ``dA = xᵀ u`` and ``dB = hᵀ dy``, and XLA:CPU then
materialises the transpose of the *wide* array (``x`` or ``dy``, one row per token).
Here it is always the thin operand that is transposed: ``dA = (uᵀ x)ᵀ`` and
``dB = hᵀ dy``. The frozen kernel is not involved, so an adapter never produces ``dW0``.

Residuals are the operand and the factor, each only if the other's gradient is wanted:
LoRA-FA's A, which isn't trained, needs no x. Dropout saves its key, not its mask, and
regenerates the mask in the backward pass.
"""

import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from lora_jax.array_types import AnyFloat, DropoutKey, KeepKey
from lora_jax.names import X_A
from lora_jax.ops.target import target_device, target_platform

_MIN_FOR_BARRIER = 16
MAX_VECTOR_RANK = 16  # more takes longer than the matmul that it hides behind
MIN_VECTOR_BYTES = 2**22  # of the update; less has nothing to hide behind
RANK = "R"  # the label of the rank axis in every product's equation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def factor_product(
    equation: str,
    rate: float,
    precision: jax.lax.PrecisionLike,
    x: AnyFloat,
    factor: AnyFloat,
    key: DropoutKey | None = None,
) -> AnyFloat:
    """Computes ``einsum(equation, dropout(x), factor)`` in the dtype of ``x``.

    Args:
      equation: an explicit two-operand einsum in which the label ``R`` is the rank.
      rate: probability of dropping an element of ``x``; the others are scaled up.
      precision: as in `jax.lax.dot_general`.
      x: the layer's input (for A) or ``x A`` (for B).
      factor: A or B, usually float32; cast to the dtype of ``x`` for the product.
      key: PRNG key for dropout; None if the rate is 0.

    Returns:
      The product, in the dtype of ``x``.
    """
    return _product(equation, rate, precision, x, factor, key)


def _product(equation, rate, precision, x, factor, key):
    x = dropout(_apart(equation.split(",")[0], x), rate, key)
    return einsum(equation, x, factor.astype(x.dtype), precision=precision)


def _apart(labels: str, x: AnyFloat) -> AnyFloat:
    """Returns the operand of a thin product; on a GPU, one that W0's doesn't share.

    XLA:GPU would join ``x W0`` and ``x A`` to one product with ``[W0 | A]``, for which
    it copies W0 at every step.
    """
    is_shared = RANK not in labels and target_platform() == "gpu"
    return jax.lax.optimization_barrier(x) if is_shared else x


def _forward(product, equation, rate, precision, x, factor, key=None):
    # Not `factor_product`: forward-over-reverse differentiates this function.
    key = jax.tree.map(lambda leaf: leaf.value, key)  # also of a `KeepKey`, or None
    y = product(equation, rate, precision, x.value, factor.value, key)
    rows = x.value if factor.perturbed else None
    weights = factor.value if x.perturbed else None
    # Empty arrays stand for dtypes, and for what the operands vary over.
    likes = [operand.value.reshape(-1)[:0] for operand in (x, factor)]
    return y, (rows, weights, likes, key)


def _backward(product, equation, rate, precision, residuals, dy):
    x, factor, (x_like, factor_like), key = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    operands, out = equation.split("->")
    x_labels, factor_labels = operands.split(",")
    dx = d_factor = None
    if factor is not None:
        transposed = f"{out},{factor_labels}->{x_labels}"
        dx = product(transposed, 0.0, precision, dy, factor, None)
        dx = _varying_like(dropout(dx, rate, key), x_like)
    if x is not None:
        x, dtype = dropout(x, rate, key), factor_like.dtype
        labels = (x_labels, factor_labels, out)
        d_factor = _factor_gradient(labels, precision, x, dy, dtype)
        d_factor = _varying_like(d_factor, factor_like)
    return dx, d_factor, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _added_product(equation, rate, precision, x, factor, key=None):
    """`factor_product` next to a base's product of the same x, or added to that.

    Forward, B's product is added to the base's; backward, A's gradient is.
    """
    return _spread_out(equation, rate, precision, x, factor, key)


def _spread_out(equation, rate, precision, x, factor, key):
    """Computes `_product`, on a TPU without a matmul if the factor is thin.

    XLA then adds the update to the base's product as that is written, in the vector
    unit and behind the matmul. Another matmul has to read and write the wide result
    again: by the compiler's estimate 4.9 million cycles for 4,096 tokens from 4,096 to
    14,336 features at rank 8 on v5e, 3.8 like this, and 3.7 without the update; the
    same for the gradient of an input that wide. A v6e multiplies matrices too fast to
    hide it: 78 thousand cycles against 67 for a layer.
    """
    operands, out = equation.split("->")
    x_labels, factor_labels = operands.split(",")
    sizes = dict(zip(x_labels, x.shape, strict=True))
    sizes |= dict(zip(factor_labels, factor.shape, strict=True))
    is_large = math.prod(sizes[c] for c in out) * x.dtype.itemsize >= MIN_VECTOR_BYTES
    is_outer = {c for c in x_labels + factor_labels if c not in out} == {RANK}
    is_thin = is_outer and not rate and sizes[RANK] <= MAX_VECTOR_RANK
    is_hidden = target_platform() == "tpu" and not target_device().startswith("TPU v6")
    if not (is_hidden and is_thin and is_large):
        return _product(equation, rate, precision, x, factor, key)
    factor = factor.astype(x.dtype)
    wide = jnp.promote_types(jnp.float32, x.dtype)
    rows, columns = (
        _rank_first(array.astype(wide), labels, out)
        for array, labels in ((x, x_labels), (factor, factor_labels))
    )
    y: Any = sum(rows[j] * columns[j] for j in range(sizes[RANK]))
    return y.astype(x.dtype)


def _rank_first(array, labels, out):
    """Returns ``[r, ...]``, broadcastable to the labels of ``out`` without the rank."""
    order = [labels.index(c) for c in RANK + out if c in labels]
    missing = [i for i, c in enumerate(RANK + out) if c not in labels]
    return jnp.expand_dims(array.transpose(order), missing)


def _factor_gradient(labels, precision, x, dy, dtype):
    """Returns the gradient of A or B, in ``dtype``."""
    x_labels, factor_labels, out = labels
    # Thin operand first, rank axis leading: only thin arrays are transposed.
    thin, wide = (out, x_labels) if RANK in out else (x_labels, out)
    thin_array, wide_array = dy, x
    if thin != out:
        thin_array, wide_array = wide_array, thin_array
    batch = "".join(c for c in factor_labels if c in thin and c in wide)
    rest = "".join(c for c in factor_labels if c not in batch and c != RANK)
    order = [f"{batch}{RANK}{rest}".index(c) for c in factor_labels]
    is_transposed = order != sorted(order)
    # Without a barrier XLA:CPU folds this transpose into the product and transposes the
    # wide operand after all (8 times slower for [768, 1536], rank 8). Small arrays get
    # no barrier: it gains nothing there, and XLA:CPU (jaxlib 0.10.2) aborts on a
    # batched product over 2 or 3 rows or columns that feeds a barrier. XLA:CPU can't
    # compute the folded product from bfloat16 to float32, so it is float32 throughout.
    sizes = dict(zip(wide, wide_array.shape, strict=True))
    columns = math.prod(sizes[label] for label in rest)
    rows = math.prod(sizes[label] for label in wide if label not in batch + rest)
    is_small = min(rows, columns) < _MIN_FOR_BARRIER
    if is_transposed and is_small:
        thin_array = thin_array.astype(dtype)
        wide_array = wide_array.astype(dtype)
    rank_first = einsum(
        f"{thin},{wide}->{batch}{RANK}{rest}",
        thin_array,
        wide_array,
        precision=precision,
        preferred_element_type=dtype,
    )
    if is_transposed and not is_small and target_platform() == "cpu":
        rank_first = jax.lax.optimization_barrier(rank_first)
    return rank_first.transpose(order)


def _varying_like(gradient: AnyFloat, primal: AnyFloat) -> AnyFloat:
    """Sums a gradient over the `jax.shard_map` axes its primal is replicated on.

    Autodiff does the same, and `jax.shard_map` checks it (``check_vma``).
    """
    own, wanted = varying_axes(gradient), varying_axes(primal)
    if summed := tuple(own - wanted):
        gradient = jax.lax.psum(gradient, summed)
    if missing := tuple(wanted - own):
        gradient = jax.lax.pcast(gradient, missing, to="varying")
    return gradient


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Returns the `jax.shard_map` axes over which an array varies."""
    aval = jax.typeof(array)  # `mat.varying` since JAX 0.10, `vma` before
    varying = getattr(getattr(aval, "mat", None), "varying", None)
    return frozenset(getattr(aval, "vma", ()) if varying is None else varying)


for _function, _how in ((factor_product, _product), (_added_product, _spread_out)):
    _function.defvjp(
        functools.partial(_forward, _how),
        functools.partial(_backward, _how),
        symbolic_zeros=True,
    )


def einsum(equation: str, x: AnyFloat, y: AnyFloat, **options: Any) -> AnyFloat:
    """Computes `jnp.einsum`, contracting axes in the order of the larger operand.

    `jnp.einsum` contracts labels in alphabetical order; if the axes are in another
    order, XLA:CPU first makes a transposed copy of the operand. The equation must be
    explicit, with two operands and no ellipsis.
    """
    x_labels, y_labels = equation.split("->")[0].split(",")
    labels = x_labels + y_labels if x.size >= y.size else y_labels + x_labels
    names = dict(zip(dict.fromkeys(labels), string.ascii_letters, strict=False))
    sorted_equation = "".join(names.get(c, c) for c in equation)
    return jnp.einsum(sorted_equation, x, y, **options)


def low_rank_update(
    down: str,
    up: str,
    x: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
    hidden: AnyFloat | None = None,
    is_rescaled: bool = False,
) -> AnyFloat:
    """Computes ``scaling * (x A) B``, everything that LoRA adds to a layer.

    Args:
      down: equation of ``x A``, where ``R`` labels the rank.
      up: equation of ``h B``.
      x: input of the layer.
      lora_a: A, with the axes that ``down`` expects.
      lora_b: B, with the axes that ``up`` expects.
      scaling: ``alpha / rank``; a traced scalar works too.
      dropout_rate: probability of dropping an element of ``x``; a Python float.
      dropout_key: PRNG key, required if the rate is above 0.
      precision: as in `jax.lax.dot_general`.
      dtype: dtype of the computation and result; default: that of ``x``.
      hidden: ``dropout(x) A`` if already computed, see `lora_jax.ops.shared`.
      is_rescaled: whether the layer's output is scaled afterwards (DoRA), which is
        fused with a matmul better than with a sum.

    Returns:
      The update, in ``dtype``.

    Raises:
      ValueError: if the rate is outside [0, 1], or above 0 without a key.
      TypeError: if ``x``, A or B is not floating.
    """
    check_floating(x=x, lora_a=lora_a, lora_b=lora_b)
    key = check_dropout(dropout_rate, dropout_key)
    x = x.astype(x.dtype if dtype is None else dtype)
    h: Any = hidden  # [..., r]
    if h is None:
        product = _added_product if key is None else factor_product
        h = product(down, dropout_rate, precision, x, lora_a, key)
    h = checkpoint_name(scale(h, scaling), X_A)  # cheapest here, at rank width
    product = factor_product if is_rescaled else _added_product
    return product(up, 0.0, precision, h, lora_b)


def scale(x: AnyFloat, scaling: float | jax.Array) -> AnyFloat:
    """Computes ``scaling * x`` in at least float32, rounded once to the dtype of x."""
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return (x.astype(wide) * jnp.asarray(scaling, wide)).astype(x.dtype)


def dropout(x: AnyFloat, rate: float, key: DropoutKey | None) -> AnyFloat:
    """Zeroes elements with probability ``rate``, scaling the rest by ``1/(1-rate)``."""
    keep: Any = 1.0 - rate
    if isinstance(key, KeepKey):
        key, keep = key
    elif rate == 1.0:
        return jnp.zeros_like(x)
    elif rate == 0.0 or key is None:
        return x
    is_kept = jax.random.bernoulli(key, keep, x.shape)
    wide = jnp.promote_types(jnp.float32, x.dtype)  # don't round 1 - rate to bfloat16
    scaled = x.astype(wide) / jnp.asarray(keep, wide)
    return jnp.where(is_kept, scaled.astype(x.dtype), 0)


def check_dropout(rate: float, key: DropoutKey | None) -> DropoutKey | None:
    """Raises on an invalid rate or missing key; returns the key if it will be used."""
    if isinstance(key, KeepKey):  # it has its own rate
        return key
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1]; got {rate}.")
    if rate > 0.0 and key is None:
        raise ValueError(
            f"dropout_key must be a PRNG key if dropout_rate > 0; got None with "
            f"dropout_rate={rate}. Pass dropout_rate=0.0 for deterministic calls."
        )
    return key if 0.0 < rate < 1.0 else None


def check_floating(**arrays: jax.Array | None) -> None:
    """Raises a TypeError listing every argument that is not a floating-point array."""
    others = {
        name: type(array).__name__
        for name, array in arrays.items()
        if array is not None and not hasattr(array, "dtype")
    }
    if others:
        got = ", ".join(f"{name} {kind}" for name, kind in others.items())
        raise TypeError(
            f"{', '.join(others)} must be arrays; got {got}. Convert with "
            "`jnp.asarray`."
        )
    wrong = {
        name: array.dtype.name
        for name, array in arrays.items()
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating)
    }
    if wrong:
        got = ", ".join(f"{name} {dtype}" for name, dtype in wrong.items())
        raise TypeError(
            f"{', '.join(wrong)} must be floating-point; got {got}. "
            "Convert with `.astype(jnp.float32)`."
        )
