"""``x A`` for several layers with the same input, reading it once.

Query, key and value projections share their input, so their adapters share one product
``x @ [Aq | Ak | Av]`` that reads the wide ``x`` once.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, DropoutKey, Inputs
from lora_jax.ops.product import check_dropout, check_floating, factor_product

_LEADING = "abcdefghjklmnopqstuvwxyz"  # labels of the leading dimensions: not i, R


def shared_hidden(
    x: Inputs,
    factors: Sequence[AnyFloat],
    *,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> list[AnyFloat]:
    """Computes ``dropout(x) @ A`` for several adapters with the same input.

    Computes ``dropout(x) @ [A1 | A2 | ...]`` as one product, with one dropout mask, and
    splits it. Pass each part to its layer's op as ``hidden``.

    Args:
      x: the input of all layers ``[*b, i]``.
      factors: A of each layer ``[i, r]``; ranks may differ.
      dropout_rate: probability of dropping an element of ``x``.
      dropout_key: PRNG key, required if the rate is above 0.
      precision: as in `jax.lax.dot_general`.

    Returns:
      One ``[*b, r]`` per layer, in the dtype of ``x``.

    Raises:
      ValueError: listing every layer whose shapes are incompatible; or if the dropout
        rate is outside [0, 1] or lacks a key.
      TypeError: if an array is not floating.

    Example:
      >>> x, a = jnp.ones((2, 3)), jnp.ones((3, 1))
      >>> q, k = shared_hidden(x, [a, 2 * a])
      >>> q[0].tolist(), k[0].tolist()
      ([3.0], [6.0])

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.2.
    """
    named = {f"lora_a[{j}]": a for j, a in enumerate(factors)}
    check_floating(x=x, **named)
    faults = [
        f"{name} must be [in, rank] with in = {x.shape[-1]}; got {a.shape}."
        for name, a in named.items()
        if a.ndim != 2 or a.shape[0] != x.shape[-1]
    ]
    if faults:
        raise ValueError(" ".join(faults))
    if not factors:
        return []
    key = check_dropout(dropout_rate, dropout_key)
    rows = _LEADING[: x.ndim - 1]
    equation = f"{rows}i,iR->{rows}R"
    all_a = jnp.concatenate(factors, axis=-1)  # [i, sum of ranks]
    h: jax.Array = factor_product(equation, dropout_rate, precision, x, all_a, key)
    ends = list(itertools.accumulate(a.shape[1] for a in factors))
    return jnp.split(h, ends[:-1], axis=-1)
