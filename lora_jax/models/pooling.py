"""Pooling: from the hidden states of a row's tokens to one vector."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.models.embeddings import Hidden, TokenIds

Pooled = Float[Array, "b d"]

POOLINGS = ("mean", "cls", "pooler", "cls_mean")
SENTENCE_POOLINGS = (  # as sentence-transformers names them
    *("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
)


def mean_pool(hidden: Hidden, attention_mask: TokenIds) -> Pooled:
    """Averages the hidden states of unmasked tokens, in float32.

    Computes ``sum_t mask * hidden / max(sum_t mask, 1)``: zeros for an all-padding row.

    Args:
      hidden: hidden states ``[b, t, d]``.
      attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding.

    Returns:
      Averages ``[b, d]`` float32.

    Example:
      >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])).item()
      2.0
    """
    mask = attention_mask.astype(jnp.float32)[..., None]  # [b, t, 1]
    total = jnp.sum(hidden.astype(jnp.float32) * mask, axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1.0)


def pool(hidden: Hidden, mask: TokenIds, pooling: str) -> Pooled:
    """Pools hidden states to one vector per row, in float32.

    Args:
      hidden: hidden states ``[b, t, d]``.
      mask: ``[b, t]``, 1 for real tokens and 0 for padding.
      pooling: "mean" over unmasked tokens; "cls" or "pooler": the first token's;
        "cls_mean": the first token's and the mean of the others, concatenated.

    Returns:
      Vectors ``[b, d]``; ``[b, 2 d]`` for "cls_mean".
    """
    if pooling == "mean":
        return mean_pool(hidden, mask)
    first = hidden[:, 0].astype(jnp.float32)
    if pooling == "cls_mean":
        others = mean_pool(hidden[:, 1:], mask[:, 1:])
        return jnp.concatenate([first, others], axis=-1)
    return first


def sentence_pool(hidden: Hidden, mask: TokenIds, mode: str) -> Pooled:
    """Pools as sentence-transformers does, in float32.

    Computes ``Σ_t w_t hidden_t``, with ``w_t`` over unmasked tokens only: ``1 / n``
    ("mean"), ``1 / √n`` ("mean_sqrt_len_tokens"), ``t / Σ t`` with ``t = 1 ... n``
    ("weightedmean"), 1 for the first ("cls") or the last ("lasttoken"); or the largest
    of each channel ("max").

    Args:
      hidden: hidden states ``[b, t, d]``.
      mask: ``[b, t]``, 1 for real tokens and 0 for padding; at least one per row.
      mode: one of `SENTENCE_POOLINGS`.

    Returns:
      Vectors ``[b, d]``.

    Example:
      >>> hidden, mask = jnp.array([[[1.0], [4.0], [9.0]]]), jnp.array([[1, 1, 0]])
      >>> [sentence_pool(hidden, mask, m).item() for m in ("cls", "lasttoken", "max")]
      [1.0, 4.0, 4.0]
      >>> sentence_pool(hidden, mask, "weightedmean").item()  # (1 * 1 + 2 * 4) / 3
      3.0
    """
    real = mask.astype(jnp.float32)  # [b, t]
    x = hidden.astype(jnp.float32)
    places = jnp.arange(1, mask.shape[1] + 1)
    first = jnp.argmax(mask != 0, axis=1)  # [b]
    if mode == "max":
        return jnp.max(jnp.where(mask[..., None] != 0, x, -jnp.inf), axis=1)
    if mode in ("cls", "lasttoken"):
        last = jnp.max(jnp.where(mask != 0, places, 1), axis=1) - 1
        chosen = first if mode == "cls" else last
        return jnp.take_along_axis(x, chosen[:, None, None], axis=1)[:, 0]
    weights = real
    if mode == "weightedmean":
        weights = real * (places - first[:, None])
    total = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-9)  # [b, 1]
    total = jnp.sqrt(total) if mode == "mean_sqrt_len_tokens" else total
    return jnp.einsum("bt,btd->bd", weights, x, precision="highest") / total
