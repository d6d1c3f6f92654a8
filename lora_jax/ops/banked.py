"""The update of several adapters on one layer, each row or token with its own.

``y[j] = (x[j] A[id[j]]) B[id[j]]``, zero where the id is 0. `WAYS` compute the same:

- ``gather``: each row takes its A and B out of the bank, and the products are batched.
  Reads the factors once a row, so it suits many tokens a row.
- ``sort``: tokens are sorted by id, and `grouped_dot` multiplies each group by its
  factors. Reads every factor in use once, and moves the tokens twice.
- ``mask``: all A side by side are one wide matrix, ``x [A1 | A2 | ...]``; a mask keeps
  each token's own part, which ``[B1; B2; ...]`` then takes. Two plain products, with
  ``m`` times the arithmetic: for few adapters of a small rank.

`best_way` says which is fastest where, by ``python -m benchmarks bank``.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from lora_jax.ops.grouped import grouped_dot
from lora_jax.ops.target import target_platform

Way = Literal["auto", "gather", "sort", "mask"]
AUTO: Way = "auto"  # that of `best_way`
WAYS: tuple[Way, ...] = ("gather", "sort", "mask")


def best_way(rows: int, tokens: int, adapters: int, *, of_tokens: bool = False) -> Way:
    """Returns the way that the benchmark found fastest, on the target's platform.

    A row's own factors are read for all of its tokens, so ``"gather"`` is the fastest
    but where rows of a single token outnumber the adapters: then ``"mask"``, which
    reads every adapter once, reads less. Tokens' own factors are too many to gather:
    a CPU masks few adapters and sorts by more; on a TPU (by its compiler's estimate,
    and so on a GPU, where nothing was measured) `jax.lax.ragged_dot` takes longer than
    the mask's arithmetic.

    Args:
      rows: of the batch.
      tokens: of a row.
      adapters: that the bank has room for.
      of_tokens: whether every token has its own adapter, not every row.

    Returns:
      One of `WAYS`.

    Example:
      >>> best_way(8, 128, 4), best_way(64, 1, 4)
      ('gather', 'mask')
    """
    platform = target_platform()
    if of_tokens:
        return "sort" if platform == "cpu" and adapters > 8 else "mask"
    outnumber = rows * {"cpu": 1 / 4, "tpu": 2}.get(platform, 1)  # a GPU's by bytes
    return "mask" if tokens == 1 and adapters <= outnumber else "gather"


def banked_update(
    x: Float[Array, "*b i"],
    lora_a: Float[Array, "m _ _"],
    lora_b: Float[Array, "m _ _"],
    ids: Int[Array, "..."],
    *,
    way: str = AUTO,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*b o"]:
    """Computes ``(x[j] A[id[j]]) B[id[j]]``; the scaling is in B.

    Args:
      x: inputs ``[b, *t, i]``; sets the dtype.
      lora_a: A of ``m`` adapters; the first is no adapter and is not read.
      lora_b: B of them.
      ids: of the rows ``[b]``, or of their tokens ``[b, *t]``; 0 to ``m - 1``, 0 for
        none. A traced id out of range can't be refused and gives NaN.
      way: how it is computed: one of `WAYS`, or ``"auto"`` for `best_way`.
      precision: as in `jax.lax.dot_general`.

    Returns:
      The update ``[b, *t, o]``, in the dtype of ``x``.

    Raises:
      ValueError: if the shapes don't fit, an id is out of range, or there is no such
        way.

    Example:
      >>> a, b = jnp.ones((3, 2, 1)), jnp.arange(3.0).reshape(3, 1, 1)
      >>> banked_update(jnp.ones((2, 2)), a, b, jnp.array([2, 0]))[:, 0].tolist()
      [4.0, 0.0]
    """
    rows = x.shape[:-1]
    if ids.shape not in (rows[:1], rows):
        raise ValueError(
            f"ids must be one for each row, {rows[:1]}, or for each token, {rows}; got "
            f"{ids.shape} for x of shape {x.shape}."
        )
    (m, i, r), (n, q, _) = lora_a.shape, lora_b.shape
    if (m, r, i) != (n, q, x.shape[-1]):
        raise ValueError(
            f"lora_a, lora_b must be [m, in, rank], [m, rank, out] with in = "
            f"{x.shape[-1]}; got {lora_a.shape}, {lora_b.shape}."
        )
    if way not in (AUTO, *WAYS):
        raise ValueError(f"way must be one of {AUTO}, {', '.join(WAYS)}; got {way!r}.")
    if way == AUTO:
        tokens = math.prod(rows[1:])
        of_tokens = ids.ndim > 1 and tokens > 1
        way = best_way(rows[0], tokens, m - 1, of_tokens=of_tokens)
    if not isinstance(ids, Tracer) and jnp.any((ids < 0) | (ids >= m)):
        raise ValueError(
            f"ids must be from 0 to m - 1 = {m - 1}; got {jnp.min(ids)} to "
            f"{jnp.max(ids)}."
        )
    a, b = lora_a.astype(x.dtype), lora_b.astype(x.dtype)
    y = _COMPUTE[way](x, a, b, ids, precision)
    spread = ids.reshape(*ids.shape, *[1] * (x.ndim - ids.ndim))
    y = jnp.where(spread == 0, 0, y)
    return jnp.where((spread >= 0) & (spread < m), y, jnp.nan)


def _gather(x, a, b, ids, precision):
    labels = "abcdefghjklmn"[: x.ndim - 1]
    own = labels[: ids.ndim]
    h = jnp.einsum(f"{labels}i,{own}ir->{labels}r", x, a[ids], precision=precision)
    return jnp.einsum(f"{labels}r,{own}ro->{labels}o", h, b[ids], precision=precision)


def _sort(x, a, b, ids, precision):
    rows, m = x.shape[:-1], len(a)
    ids = jnp.broadcast_to(ids.reshape(*ids.shape, *[1] * (len(rows) - ids.ndim)), rows)
    ids = jnp.where((ids > 0) & (ids < m), ids, m).ravel()  # those of none come last
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.sum(ids[:, None] == jnp.arange(1, m), axis=0, dtype=jnp.int32)
    tokens = x.reshape(-1, x.shape[-1])[order]
    h = grouped_dot(tokens, a[1:], sizes, precision=precision)
    y = grouped_dot(h, b[1:], sizes, precision=precision)
    return y[jnp.argsort(order)].reshape(*rows, -1)


def _mask(x, a, b, ids, precision):
    m, i, r = a.shape
    wide = a[1:].transpose(1, 0, 2).reshape(i, -1)  # [i, (m - 1) r]
    h = jnp.matmul(x, wide, precision=precision)
    is_own = ids[..., None] == jnp.arange(1, m)
    is_own = jnp.repeat(is_own, r, axis=-1)
    is_own = is_own.reshape(*ids.shape, *[1] * (x.ndim - 1 - ids.ndim), -1)
    h = jnp.where(is_own, h, 0)
    return jnp.matmul(h, b[1:].reshape((m - 1) * r, -1), precision=precision)


_COMPUTE = {"gather": _gather, "sort": _sort, "mask": _mask}


def row_update(way: Way, precision: jax.lax.PrecisionLike = None):
    """Returns the update of one row, which `jax.vmap` turns into that of all rows.

    Under `jax.vmap` over rows and ids, but not over A and B, it is `banked_update` of
    the whole batch in the given way: a model is mapped row by row, and yet the bank
    sees all rows at once.

    Args:
      way: see `banked_update`.
      precision: likewise.

    Returns:
      A function of a row ``x`` ``[1, *t, i]``, A, B, and the row's id ``[]`` or its
      tokens' ``[*t]``, to ``[1, *t, o]``.
    """

    @custom_vmap
    def update(x, lora_a, lora_b, ids):
        return banked_update(x, lora_a, lora_b, ids[None], way=way, precision=precision)

    @update.def_vmap
    def of_batch(size, is_mapped, x, lora_a, lora_b, ids):
        if is_mapped[1] or is_mapped[2]:
            raise ValueError("a bank's A and B must not be mapped; map the ids.")
        x, ids = (
            leaf if mapped else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, mapped in ((x, is_mapped[0]), (ids, is_mapped[3]))
        )
        y = banked_update(
            x.reshape(size, *x.shape[2:]),
            lora_a,
            lora_b,
            ids,
            way=way,
            precision=precision,
        )
        return y[:, None], True

    return update
