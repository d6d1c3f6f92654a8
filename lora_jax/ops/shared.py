"""Updates of several layers that share one input, and so one read of it.

Query, key and value are three kernels on one input. Their adapters need one product
``x @ [Aq | Ak | Av]`` between them, so the wide ``x`` is read once for all three.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.array_types import AnyFloat, Inputs, PRNGKey
from lora_jax.ops.product import check_dropout, check_floating, factor_product, scale

_BATCH, _OUT = "abcdefghjklm", "nopqstuvwxyz"  # labels; i is the input, R the rank


def shared_updates(
    x: Inputs,
    factors: Sequence[tuple[AnyFloat, AnyFloat]],
    *,
    scalings: Sequence[float | jax.Array],
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    precision: jax.lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> list[AnyFloat]:
    """Computes ``scaling * (x A) B`` for several adapters of one input.

    Computes ``h = dropout(x) @ [A1 | A2 | ...]`` in one product, then ``h_j @ B_j`` for
    each. One dropout mask serves all of them.

    Args:
      x: the input of all layers ``[*b, i]``.
      factors: ``(A, B)`` of each layer, ``[i, r]`` and ``[r, *o]``; ranks may differ.
      scalings: ``alpha / rank`` of each layer.
      dropout_rate: probability of dropping an element of ``x``.
      dropout_key: PRNG key, needed where the rate is above 0.
      precision: as in `jax.lax.dot_general`.
      dtype: of the computation and the results; default: that of ``x``.

    Returns:
      The update of each layer, ``[*b, *o]``.

    Raises:
      ValueError: if the shapes do not chain, naming every layer at fault; or if the
        dropout rate is outside [0, 1] or lacks its key.
      TypeError: if an array is not floating.

    Example:
      >>> x, a, b = jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones((1, 4))
      >>> q, k = shared_updates(x, [(a, b), (a, 2 * b)], scalings=[1.0, 0.5])
      >>> q[0, 0].item(), k[0, 0].item()
      (3.0, 3.0)

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.2.
    """
    check_floating(x=x)
    faults = []
    for j, (a, b) in enumerate(factors):
        check_floating(**{f"lora_a[{j}]": a, f"lora_b[{j}]": b})
        if a.ndim != 2 or a.shape[0] != x.shape[-1] or b.shape[:1] != a.shape[1:]:
            faults.append(
                f"lora_a[{j}], lora_b[{j}] must be [in, rank], [rank, *out] with in = "
                f"{x.shape[-1]}; got {a.shape}, {b.shape}."
            )
    if faults:
        raise ValueError(" ".join(faults))
    if not factors:
        return []
    key = check_dropout(dropout_rate, dropout_key)
    x = x.astype(dtype or x.dtype)
    rows = _BATCH[: x.ndim - 1]
    down = jnp.concatenate([a for a, _ in factors], axis=-1)  # [i, sum of ranks]
    equation = f"{rows}i,iR->{rows}R"
    h: jax.Array = factor_product(equation, dropout_rate, precision, x, down, key)
    ends = list(itertools.accumulate(a.shape[1] for a, _ in factors))
    parts = jnp.split(h, ends[:-1], axis=-1)  # each [*b, r]
    updates = []
    for part, (_, b), scaling in zip(parts, factors, scalings, strict=True):
        out = _OUT[: b.ndim - 1]
        up = f"{rows}R,R{out}->{rows}{out}"
        part = scale(part, scaling)
        updates.append(factor_product(up, 0.0, precision, part, b))
    return updates
