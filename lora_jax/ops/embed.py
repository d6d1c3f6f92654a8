"""LoRA for an embedding table: lookups, and the logits of a tied output head."""

import jax
import jax.numpy as jnp

from lora_jax.array_types import (
    AnyFloat,
    DropoutKey,
    Embedding,
    EmbeddingA,
    EmbeddingB,
    TokenIds,
)
from lora_jax.ops.contraction import check_factors
from lora_jax.ops.dora import dora_scale, rescale
from lora_jax.ops.product import (
    check_floating,
    factor_product,
    low_rank_update,
    scale,
)

_LEADING = "abcefghijklmnopqstuwxyz"  # not d, v, R


def lora_embed(
    ids: TokenIds,
    embedding: Embedding,
    lora_a: EmbeddingA,
    lora_b: EmbeddingB,
    *,
    scaling: float | jax.Array,
    magnitude: AnyFloat | None = None,
    base_output: AnyFloat | None = None,
) -> AnyFloat:
    """Looks up rows of a frozen table plus its low-rank update.

    Computes ``E[ids] + scaling * A[ids] @ B``: a dense layer on one-hot inputs, to
    which no dropout applies.

    Args:
      ids: integer row indices ``[*b]``; out of range gives NaN, as in `jnp.take`.
      embedding: frozen table ``E`` ``[v, d]``; sets the dtype of the result.
      lora_a: ``A`` ``[v, r]``, zero at init.
      lora_b: ``B`` ``[r, d]``, random at init.
      scaling: ``alpha / rank``.
      magnitude: DoRA's ``m`` ``[d]``, or None; see `lora_dense`.
      base_output: ``E[ids]`` ``[*b, d]`` if already computed; sets the dtype of the
        result.

    Returns:
      Rows ``[*b, d]``, in the dtype of ``embedding`` (of ``base_output`` if it is
      given).

    Raises:
      ValueError: if the shapes are incompatible.
      TypeError: if ``ids`` is not integer or another array is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> table, a, b = (jnp.ones(s) for s in [(5, 4), (5, 2), (2, 4)])
      >>> lora_embed(jnp.array([1, 3]), table, a, b, scaling=0.5)[0].tolist()
      [2.0, 2.0, 2.0, 2.0]

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1, on a one-hot input.
    """
    check_floating(embedding=embedding, lora_a=lora_a, lora_b=lora_b)
    check_factors(embedding.shape, lora_a.shape, lora_b.shape)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers; got {ids.dtype}.")
    y = jnp.take(embedding, ids, axis=0) if base_output is None else base_output
    b = _LEADING[: ids.ndim]
    h = jnp.take(lora_a, ids, axis=0).astype(y.dtype)  # [*b, r]
    h = scale(h, scaling)
    update: AnyFloat = factor_product(f"{b}R,Rd->{b}d", 0.0, None, h, lora_b)
    y = y + update
    if magnitude is None:
        return y
    return rescale(y, dora_scale(embedding, lora_a, lora_b, magnitude, scaling=scaling))


def lora_attend(
    x: AnyFloat,
    embedding: Embedding,
    lora_a: EmbeddingA,
    lora_b: EmbeddingB,
    *,
    scaling: float | jax.Array,
    magnitude: AnyFloat | None = None,
    base_output: AnyFloat | None = None,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> AnyFloat:
    """Multiplies by the transposed table: the logits of a tied output head.

    Computes ``x @ (E + scaling * A @ B).T`` as ``x Eᵀ + scaling * (x Bᵀ) Aᵀ``, with the
    same A and B as the lookup. DoRA has one scale per each of the ``d`` inputs here, so
    it scales ``x``.

    Args:
      x: queries ``[*b, d]``; sets the dtype of the computation and of the result.
      embedding: frozen table ``E`` ``[v, d]``.
      lora_a: ``A`` ``[v, r]``.
      lora_b: ``B`` ``[r, d]``.
      scaling: ``alpha / rank``.
      magnitude: DoRA's ``m`` ``[d]``, or None. Can't be combined with ``base_output``:
        scale the queries with `dora_query` first.
      base_output: ``x Eᵀ`` ``[*b, v]`` if already computed; sets the dtype of the
        result.
      dropout_rate: probability of dropping an element of the update's input.
      dropout_key: PRNG key, required if ``dropout_rate`` is above 0.
      precision: as in `jax.lax.dot_general`.

    Returns:
      Logits ``[*b, v]``, in the dtype of ``x`` (of ``base_output`` if it is given).

    Raises:
      ValueError: if the shapes are incompatible, the dropout key is missing, or both
        ``magnitude`` and ``base_output`` are given.
      TypeError: if an array is not floating.
    """
    check_floating(x=x, embedding=embedding, lora_a=lora_a, lora_b=lora_b)
    check_factors(embedding.shape, lora_a.shape, lora_b.shape)
    if x.ndim == 0 or x.shape[-1] != embedding.shape[1]:
        raise ValueError(
            f"x must be [*b, d] = [*b, {embedding.shape[1]}] for a table of shape "
            f"{embedding.shape}; got {x.shape}."
        )
    if magnitude is not None:
        if base_output is not None:
            raise ValueError(
                "magnitude and base_output must not both be given; DoRA scales the "
                "queries of a tied head: pass them through `dora_query` first."
            )
        x = dora_query(x, embedding, lora_a, lora_b, magnitude, scaling=scaling)
    y = base_output
    if y is None:
        y = jnp.dot(x, embedding.T.astype(x.dtype), precision=precision)  # [*b, v]
    b = _LEADING[: x.ndim - 1]
    return y + low_rank_update(
        f"{b}d,Rd->{b}R",
        f"{b}R,vR->{b}v",
        x,
        lora_b,
        lora_a,
        scaling=scaling,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        dtype=y.dtype,
    )


def dora_query(
    x: AnyFloat,
    embedding: Embedding,
    lora_a: EmbeddingA,
    lora_b: EmbeddingB,
    magnitude: AnyFloat,
    *,
    scaling: float | jax.Array,
) -> AnyFloat:
    """Scales the input of a tied head: ``x (m / n ⊙ (E + scaling * A B))ᵀ``.

    Args:
      x: queries ``[*b, d]``.
      embedding: frozen table ``E`` ``[v, d]``.
      lora_a: ``A`` ``[v, r]``.
      lora_b: ``B`` ``[r, d]``.
      magnitude: DoRA's ``m`` ``[d]``.
      scaling: ``alpha / rank``.

    Returns:
      ``x * m / n``, to be multiplied by the adapted table.
    """
    return rescale(x, dora_scale(embedding, lora_a, lora_b, magnitude, scaling=scaling))
