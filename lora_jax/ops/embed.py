"""LoRA on an embedding table: rows looked up, or attended to by a tied head."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.array_types import (
    AnyFloat,
    Embedding,
    EmbeddingA,
    EmbeddingB,
    TokenIds,
)
from lora_jax.ops.contraction import check_factors
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
) -> AnyFloat:
    """Looks up rows of a frozen table plus its low-rank update.

    Computes ``E[ids] + scaling * A[ids] @ B``: a dense layer on one-hot inputs.

    Args:
      ids: row numbers ``[*b]``, integers; out of range gives NaN, as in `jnp.take`.
      embedding: frozen table ``E`` ``[v, d]``; sets the dtype of the result.
      lora_a: ``A`` ``[v, r]``, random at init.
      lora_b: ``B`` ``[r, d]``, zero at init.
      scaling: ``alpha / rank``.

    Returns:
      Rows ``[*b, d]``, in the dtype of ``embedding``.

    Raises:
      ValueError: if the shapes do not chain.
      TypeError: if ``ids`` is not integer or another array not floating.

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
    rows = jnp.take(embedding, ids, axis=0)  # [*b, d]
    return rows + embed_update(
        ids, lora_a, lora_b, scaling=scaling, dtype=embedding.dtype
    )


def lora_attend(
    x: AnyFloat,
    embedding: Embedding,
    lora_a: EmbeddingA,
    lora_b: EmbeddingB,
    *,
    scaling: float | jax.Array,
) -> AnyFloat:
    """Multiplies by the transposed table: the logits of a tied output head.

    Computes ``x @ (E + scaling * A @ B).T`` as ``x Eᵀ + scaling * (x Bᵀ) Aᵀ``, with the
    same A and B as the lookup.

    Args:
      x: queries ``[*b, d]``; sets the dtype of the computation and of the result.
      embedding: frozen table ``E`` ``[v, d]``.
      lora_a: ``A`` ``[v, r]``.
      lora_b: ``B`` ``[r, d]``.
      scaling: ``alpha / rank``.

    Returns:
      Logits ``[*b, v]``, in the dtype of ``x``.

    Raises:
      ValueError: if the shapes do not chain.
      TypeError: if an array is not floating.
    """
    check_floating(x=x, embedding=embedding, lora_a=lora_a, lora_b=lora_b)
    check_factors(embedding.shape, lora_a.shape, lora_b.shape)
    if x.ndim == 0 or x.shape[-1] != embedding.shape[1]:
        raise ValueError(
            f"x must be [*b, d] = [*b, {embedding.shape[1]}] for a table of shape "
            f"{embedding.shape}; got {x.shape}."
        )
    logits = jnp.dot(x, embedding.T.astype(x.dtype))  # [*b, v]
    return logits + attend_update(x, lora_a, lora_b, scaling=scaling)


def embed_update(
    ids: TokenIds,
    lora_a: EmbeddingA,
    lora_b: EmbeddingB,
    *,
    scaling: float | jax.Array,
    dtype: DTypeLike,
) -> AnyFloat:
    """Computes ``scaling * A[ids] @ B`` ``[*b, d]``, the update of a lookup alone."""
    b = _LEADING[: ids.ndim]
    h = jnp.take(lora_a, ids, axis=0).astype(dtype)  # [*b, r]
    return factor_product(f"{b}R,Rd->{b}d", 0.0, None, scale(h, scaling), lora_b)


def attend_update(
    x: AnyFloat, lora_a: EmbeddingA, lora_b: EmbeddingB, **options
) -> AnyFloat:
    """Computes ``scaling * (x @ Bᵀ) @ Aᵀ`` ``[*b, v]``, the update of a tied head."""
    b = _LEADING[: x.ndim - 1]
    return low_rank_update(
        f"{b}d,Rd->{b}R", f"{b}R,vR->{b}v", x, lora_b, lora_a, **options
    )
