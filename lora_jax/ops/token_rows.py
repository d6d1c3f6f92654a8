"""Training rows of an embedding table, and no others.

With rows ``R`` ``[n, d]`` in place of those of ``n`` tokens, the table is ``E'`` with
``E'[token_k] = R_k``. It is never formed: a lookup picks from ``R`` or ``E``, and the
logits are ``x Eᵀ`` plus ``x (R - E[tokens])ᵀ`` in the columns of the tokens. So what is
computed, kept and differentiated beside the frozen table has the size of ``R``, and a
model whose rows are still the table's own is bitwise equal to its base.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_jax.array_types import AnyFloat, Embedding, TokenIds

Rows = Float[Array, "n d"]


def lookup_rows(y: AnyFloat, ids: TokenIds, rows: Rows, tokens: Sequence[int]) -> Array:
    """Replaces what a lookup found for some tokens: ``R_k`` where ``ids == token_k``.

    Args:
      y: the table's rows ``E[ids]`` ``[*b, d]``; sets the dtype of the result.
      ids: token ids ``[*b]``.
      rows: ``R`` ``[n, d]``.
      tokens: the ``n`` tokens, each once, in the order of ``rows``.

    Returns:
      ``E'[ids]`` ``[*b, d]``.

    Raises:
      ValueError: if there is not one row of ``d`` numbers for each token.

    Example:
      >>> ids, table, rows = jnp.array([1, 2]), jnp.zeros((3, 1)), jnp.ones((1, 1))
      >>> lookup_rows(table[ids], ids, rows, [2]).tolist()
      [[0.0], [1.0]]
    """
    _check(rows, tokens, y.shape[-1])
    order = np.argsort(tokens)
    known = np.asarray(tokens)[order]
    place = jnp.searchsorted(known, ids, method="scan_unrolled")
    place = jnp.minimum(place, len(known) - 1)  # [*b]
    found = rows[jnp.asarray(order)[place]]  # [*b, d]
    is_found = (jnp.asarray(known)[place] == ids)[..., None]
    return jnp.where(is_found, found.astype(y.dtype), y)


def row_deltas(rows: Rows, table: Embedding, tokens: Sequence[int]) -> Rows:
    """Returns ``R - E[tokens]`` ``[n, d]``, in the dtype of ``rows``.

    Args:
      rows: ``R`` ``[n, d]``.
      table: ``E`` ``[v, d]``.
      tokens: the ``n`` tokens.

    Raises:
      ValueError: if there is not one row of ``d`` numbers for each token.
    """
    _check(rows, tokens, table.shape[-1])
    kept = jax.lax.stop_gradient(table[np.asarray(tokens)])
    return rows - kept.astype(rows.dtype)


def add_logits(
    y: AnyFloat,
    x: AnyFloat,
    deltas: Rows,
    tokens: Sequence[int],
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """Adds ``x Δᵀ`` to the logits of some tokens.

    Args:
      y: logits ``x Eᵀ`` ``[*b, v]``; sets the dtype of the result.
      x: ``[*b, d]``.
      deltas: ``Δ = R - E[tokens]`` ``[n, d]``, from `row_deltas`.
      tokens: the ``n`` tokens.
      precision: as in `jax.lax.dot_general`.

    Returns:
      ``x E'ᵀ`` ``[*b, v]``.
    """
    own = jnp.dot(
        x,
        deltas.astype(x.dtype).T,
        precision=precision,
        preferred_element_type=y.dtype,
    )
    return y.at[..., np.asarray(tokens)].add(own)


def write_rows(
    table: AnyFloat, rows: Rows, tokens: Sequence[int], *, axis: int = 0
) -> Array:
    """Returns a table with ``rows`` in place of its own, rounded to its dtype.

    Args:
      table: ``[v, d]``, or a head's kernel ``[d, v]``.
      rows: ``[n, d]``.
      tokens: the ``n`` tokens.
      axis: the axis of the tokens.
    """
    rows = rows.astype(table.dtype)
    places = np.asarray(tokens)
    if axis == 0:
        return table.at[places].set(rows)
    return table.at[:, places].set(rows.T)


def _check(rows: Rows, tokens: Sequence[int], width: int) -> None:
    if rows.shape != (len(tokens), width):
        raise ValueError(
            f"rows must be [n, d] = [{len(tokens)}, {width}], one for each token; got "
            f"{rows.shape}."
        )
