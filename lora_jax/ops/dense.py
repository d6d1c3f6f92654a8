"""LoRA's equation: ``y = x W0 + scaling * (x A) B``.

Every adapted dense layer runs `lora_dense`: `LoRADense`, the layers of an `adapt`-ed
model, attention projections. They pass the output of their own frozen layer as
``base_output``; without it, `lora_dense` computes the base too.
"""

import jax
import jax.numpy as jnp

from lora_jax.array_types import (
    AnyFloat,
    Bias,
    DropoutKey,
    Inputs,
    Kernel,
    LoraA,
    LoraB,
    Outputs,
)
from lora_jax.ops.contraction import check_bias, check_factors
from lora_jax.ops.dora import dora_scale, rescale
from lora_jax.ops.product import check_floating, low_rank_update

_LEADING = "abcdefghjklmnpqstuvwxyz"  # labels of the leading dimensions: not i, o, R


def lora_dense(
    x: Inputs,
    kernel: Kernel,
    lora_a: LoraA,
    lora_b: LoraB,
    *,
    scaling: float | jax.Array,
    bias: Bias | None = None,
    magnitude: Bias | None = None,
    base_output: Outputs | None = None,
    hidden: AnyFloat | None = None,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Outputs:
    """Applies a frozen dense layer plus its low-rank update.

    Computes ``y = x @ W0 + bias + scaling * (dropout(x) @ A) @ B`` without forming the
    ``[i, o]`` product ``A @ B``: per row, the update costs ``r * (i + o)``
    multiply-adds and the base ``i * o``. With a ``magnitude`` (DoRA), all but the bias
    is scaled by ``magnitude / n``, where ``n`` are the column norms of
    ``W0 + scaling * A @ B``.

    The update has a custom VJP (`lora_jax.ops.product`), so JAX raises a ``TypeError``
    for forward-mode differentiation (`jax.jvp`, `jax.jacfwd`); reverse mode, and
    forward or reverse over reverse, work. No gradient of ``kernel`` is formed unless
    the caller differentiates with respect to it.

    Args:
      x: inputs ``[*b, i]``; sets the dtype of the computation and of the result.
      kernel: frozen base weight ``W0`` ``[i, o]``.
      lora_a: down-projection ``A`` ``[i, r]``, random at init.
      lora_b: up-projection ``B`` ``[r, o]``, zero at init.
      scaling: ``alpha / rank``; see `LoRAConfig.scaling_for`.
      bias: frozen base bias ``[o]``, or None.
      magnitude: DoRA's ``m`` ``[o]``, `column_norm` of the kernel at init, or None.
      base_output: ``x @ W0 + bias`` ``[*b, o]`` if already computed; sets the dtype of
        the result. Passing one call's result to the next applies several adapters.
      hidden: ``dropout(x) @ A`` ``[*b, r]`` if computed by `shared_hidden`.
      dropout_rate: probability of dropping an element of the update's input.
      dropout_key: PRNG key, required if ``dropout_rate`` is above 0.
      precision: as in `jax.lax.dot_general`.

    Returns:
      Outputs ``[*b, o]``, in the dtype of ``x`` (of ``base_output`` if it is given).

    Raises:
      ValueError: if the shapes are incompatible, or the dropout rate is outside [0, 1]
        or lacks a key.
      TypeError: if an array is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w0, a, b = (jnp.ones(s) for s in [(2, 3), (3, 4), (3, 1), (1, 4)])
      >>> lora_dense(x, w0, a, b, scaling=0.5)[0].tolist()
      [4.5, 4.5, 4.5, 4.5]

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1. The paper multiplies
      from the left (``W0 + B A``), this library from the right: ``lora_a`` and
      ``lora_b`` are the transposes of the paper's ``A`` and ``B``. DoRA: Liu et al.,
      https://arxiv.org/abs/2402.09353, equations 5 and 11.
    """
    check_floating(x=x, kernel=kernel, lora_a=lora_a, lora_b=lora_b, bias=bias)
    check_factors(kernel.shape, lora_a.shape, lora_b.shape)
    if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"x must be [*b, in] = [*b, {kernel.shape[0]}] for a kernel of shape "
            f"{kernel.shape}; got {x.shape}."
        )
    check_bias(bias, kernel.shape)
    y = base_output
    if y is None:
        y = jnp.matmul(x, kernel.astype(x.dtype), precision=precision)  # [*b, o]
        y = y if bias is None else y + bias.astype(y.dtype)
    b = _LEADING[: x.ndim - 1]
    y = y + low_rank_update(
        f"{b}i,iR->{b}R",
        f"{b}R,Ro->{b}o",
        x,
        lora_a,
        lora_b,
        scaling=scaling,
        hidden=hidden,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        dtype=y.dtype,
        is_rescaled=magnitude is not None,
    )
    if magnitude is None:
        return y
    m_over_n = dora_scale(kernel, lora_a, lora_b, magnitude, scaling=scaling)
    return rescale(y, m_over_n, bias)
