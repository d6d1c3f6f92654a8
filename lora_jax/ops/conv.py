"""LoRA for convolutions: a convolution down to ``r`` channels, a pointwise one up."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, Bias, DropoutKey
from lora_jax.ops.contraction import Contraction, check_bias, check_factors
from lora_jax.ops.dora import dora_scale, rescale
from lora_jax.ops.product import (
    check_dropout,
    check_floating,
    dropout,
    factor_product,
    scale,
)

PaddingLike = str | int | Sequence[int | tuple[int, int]]
_LEADING = "abcdefhijklmnpqstuvwxyz"  # not g, o, R


def conv_contraction(spatial: int, groups: int = 1) -> Contraction:
    """Returns the contraction of a kernel ``[*k, i/groups, o]``.

    The ``spatial`` axes and ``i`` are input, ``o`` is output, split by group.
    """
    return Contraction((), tuple(range(spatial + 1)), (spatial + 1,), groups)


def lora_conv(
    x: AnyFloat,
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    bias: Bias | None = None,
    magnitude: Bias | None = None,
    base_output: AnyFloat | None = None,
    strides: int | Sequence[int] = 1,
    padding: PaddingLike = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> AnyFloat:
    """Applies a frozen convolution plus its low-rank update.

    Computes ``conv(x, W0) + bias + scaling * conv1x1(conv(x, A), B)``, where A has the
    kernel's window and ``r`` output channels (in each group). It equals the convolution
    with ``W0 + scaling * A B``.

    Args:
      x: inputs ``[*b, *spatial, i]``, 1 to 3 spatial axes; sets the dtype.
      kernel: frozen base weight ``W0`` ``[*k, i/groups, o]``.
      lora_a: ``A`` ``[*k, i, r]``; with groups ``[groups, *k, i/groups, r]``.
      lora_b: ``B`` ``[r, o]``; with groups ``[groups, r, o/groups]``.
      scaling: ``alpha / rank``.
      bias: frozen base bias ``[o]``, or None.
      magnitude: DoRA's ``m`` ``[o]``, or None; see `lora_dense`.
      base_output: the frozen convolution's output, bias included, if already computed.
      strides: window strides, one for all axes or one per axis.
      padding: as in `flax.linen.Conv`: ``SAME``, ``VALID``, ``CIRCULAR``, ``REFLECT``,
        ``CAUSAL``, or explicit numbers.
      input_dilation: dilation of the input (a transposed convolution).
      kernel_dilation: dilation of the window.
      groups: number of feature groups.
      dropout_rate: probability of dropping an element of the update's input.
      dropout_key: PRNG key, required if ``dropout_rate`` is above 0.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      Outputs ``[*b, *spatial', o]``, in the dtype of ``x`` (of ``base_output`` if it is
      given).

    Raises:
      ValueError: if shapes, groups or padding are invalid.
      TypeError: if an array is not floating.

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1, with the window and the
      input channels together as the input of the matrix.
    """
    check_floating(x=x, kernel=kernel, lora_a=lora_a, lora_b=lora_b, bias=bias)
    spatial = kernel.ndim - 2
    if not 1 <= spatial <= 3 or x.ndim < spatial + 1:
        raise ValueError(
            f"x, kernel must be [*b, *spatial, i], [*k, i/groups, o] with 1 to 3 "
            f"spatial axes; got {x.shape}, {kernel.shape}."
        )
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}.")
    if x.shape[-1] != kernel.shape[-2] * groups or kernel.shape[-1] % groups:
        raise ValueError(
            f"x, kernel must have {groups} x i/groups and a multiple of {groups} "
            f"channels; got {x.shape[-1]} inputs for a kernel of shape {kernel.shape}."
        )
    roles = conv_contraction(spatial, groups)
    check_factors(kernel.shape, lora_a.shape, lora_b.shape, roles)
    check_bias(bias, kernel.shape)
    window = {
        "strides": strides,
        "padding": padding,
        "input_dilation": input_dilation,
        "kernel_dilation": kernel_dilation,
        "groups": groups,
        "precision": precision,
    }
    y = base_output
    if y is None:
        y = _conv(x, kernel, **window)
        y = y if bias is None else y + bias.astype(y.dtype)
    y = y + _update(
        x.astype(y.dtype),
        lora_a,
        lora_b,
        scaling=scaling,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        **window,
    )
    if magnitude is None:
        return y
    m_over_n = dora_scale(
        kernel, lora_a, lora_b, magnitude, scaling=scaling, contraction=roles
    )
    return rescale(y, m_over_n, bias)


def _update(
    x: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    groups: int,
    dropout_rate: float,
    dropout_key: DropoutKey | None,
    precision: jax.lax.PrecisionLike,
    **window,
) -> AnyFloat:
    """Computes only the update, ``scaling * conv1x1(conv(x, A), B)``."""
    key = check_dropout(dropout_rate, dropout_key)
    if groups > 1:  # [g, *k, i, r] -> [*k, i, g * r], the layout of a grouped kernel
        lora_a = jnp.moveaxis(lora_a, 0, -2)
        lora_a = lora_a.reshape(*lora_a.shape[:-2], -1)

    def down(x, lora_a, key):
        x = dropout(x, dropout_rate, key)
        return _conv(x, lora_a, groups=groups, precision=precision, **window)

    if key is not None:  # save the key, not the mask, for the backward pass
        down = jax.checkpoint(down)
    h: Any = scale(down(x, lora_a, key), scaling)
    b = _LEADING[: h.ndim - 1]
    if groups == 1:
        return factor_product(f"{b}R,Ro->{b}o", 0.0, precision, h, lora_b)
    h = h.reshape(*h.shape[:-1], groups, -1)  # [..., g, r]
    y: Any = factor_product(f"{b}gR,gRo->{b}go", 0.0, precision, h, lora_b)
    return y.reshape(*y.shape[:-2], -1)


def _conv(
    x: AnyFloat,
    kernel: AnyFloat,
    *,
    strides,
    padding,
    input_dilation,
    kernel_dilation,
    groups: int,
    precision,
) -> AnyFloat:
    """Convolves ``[*b, *spatial, i]`` with ``[*k, i/groups, o]``, as `nn.Conv` does."""
    spatial = kernel.ndim - 2
    leading = x.shape[: x.ndim - spatial - 1]
    x = x.reshape(math.prod(leading), *x.shape[len(leading) :])
    dilation = _per_axis(kernel_dilation, spatial)
    x, padding = _pad(x, padding, kernel.shape[:spatial], dilation)
    letters = "DHW"[3 - spatial :]
    y = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        _per_axis(strides, spatial),
        padding,
        lhs_dilation=_per_axis(input_dilation, spatial),
        rhs_dilation=dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        precision=precision,
    )
    return y.reshape(*leading, *y.shape[1:])


def _pad(x, padding, window, dilation):
    """Applies padding that lax lacks; returns the input and the padding for lax."""
    reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
    none = (0, 0)
    if padding in ("CIRCULAR", "REFLECT"):
        sides = [none, *((n // 2, (n + 1) // 2) for n in reach), none]
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        return jnp.pad(x, sides, mode=mode), "VALID"
    if padding == "CAUSAL":
        if len(window) != 1:
            raise ValueError(f"CAUSAL padding needs 1 spatial axis; got {len(window)}.")
        return jnp.pad(x, [none, (reach[0], 0), none]), "VALID"
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID", "SAME_LOWER"):
            raise ValueError(
                "padding must be SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL or "
                f"numbers; got {padding!r}."
            )
        return x, padding
    sides = _per_axis(padding, len(window))
    return x, [(side, side) if isinstance(side, int) else tuple(side) for side in sides]


def _per_axis(value, spatial: int) -> tuple:
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * spatial
    if len(value) != spatial:
        raise ValueError(
            f"strides, padding and dilations must have one value or {spatial}, one for "
            f"each spatial axis; got {value!r}."
        )
    return tuple(value)
