"""Attention for decoders and encoders: causal, with a KV cache, bidirectional.

The masked half of a causal score matrix is skipped by working in blocks
(`lora_jax.attention.blockwise`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_jax.attention.blockwise import (
    MaskInputs,
    Options,
    block_size,
    blockwise_attention,
)
from lora_jax.attention.dot_product import attention, choose_implementation
from lora_jax.attention.ring import ring_attention
from lora_jax.attention.splash import can_splash, splash_attention

Queries = Float[Array, "b t n h"]
Keys = Float[Array, "b s k h"]
CachedKeys = Float[Array, "b k s h"]


def causal_attention(
    query: Queries,
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    windows: tuple[int, ...] = (),
    segment_ids: Int[Array, "b t"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    place: Int[Array, " t"] | None = None,
) -> Queries:
    """Attends from each token to itself and to earlier tokens in its segment.

    Computes ``softmax(cap(scale * query keyᵀ)) value`` over keys ``s <= t`` with
    ``t - s < window`` and equal segments, where ``cap(z) = c tanh(z / c)``; the softmax
    is in float32. Query head ``j`` attends to key head ``j // (n / k)``.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``, where ``k`` divides ``n``.
      value: ``[b, t, k, h]``.
      scale: factor of the scores; ``1 / √h`` if None.
      softcap: ``c``, bound on the scores; None for no bound.
      window: number of keys a query sees, including its own; None for all. With a
        traced integer the other keys are masked instead of skipped.
      windows: the possible values of a traced window. TPUs then compile one kernel per
        value, which skips the other keys; other platforms ignore it.
      segment_ids: ``[b, t]``, the example each token of a packed row belongs to.
      sinks: a score of each head ``[n]`` that its softmax has besides those of the
        keys, with a value of zero (gpt-oss); or None. They take the blockwise kernel.
      place: each token's place in its row ``[t]``, where a mesh splits rows; None for
        ``0 ... t - 1``. See `lora_jax.parallel.sequence`.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.

    References:
      Soft-cap and windows: Gemma 2, https://arxiv.org/abs/2408.00118, section 2;
      grouped queries: Ainslie et al., https://arxiv.org/abs/2305.13245, section 2.2.
    """
    t, h = query.shape[1], query.shape[3]
    factor: float = h**-0.5 if scale is None else scale
    if place is not None:
        return ring_attention(
            query,
            key,
            value,
            place,
            scale=factor,
            softcap=softcap,
            window=window,
            segment_ids=segment_ids,
            sinks=sinks,
        )
    is_traced = isinstance(window, jax.Array)
    is_plain = sinks is None
    if is_plain and (windows or not is_traced) and can_splash(query, key):
        index = jnp.argmax(jnp.asarray(windows) == window) if is_traced else None
        return splash_attention(
            query,
            key,
            value,
            scale=factor,
            softcap=softcap,
            windows=windows if is_traced else (window,),
            window_index=index,
            segment_ids=segment_ids,
        )
    same = None if segment_ids is None else _same_segment(segment_ids, segment_ids)
    is_fused = choose_implementation(query, key, mask=same) == "cudnn"
    if is_plain and is_fused and softcap is None and not is_traced:
        reach = None if window is None or window >= t else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same,
            scale=factor,
            is_causal=True,
            local_window_size=reach,
            implementation="cudnn",
        )

    options = Options(factor, is_causal=True, size=block_size(t), softcap=softcap)
    mask_inputs = MaskInputs(segment_ids=segment_ids)
    if isinstance(window, int):
        options = options._replace(window=window)
    elif window is not None:
        mask_inputs = mask_inputs._replace(window=window)
    return blockwise_attention(query, key, value, options, mask_inputs, sinks)


def bidirectional_attention(
    query: Queries,
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    mask: Bool[Array, "b t"] | None = None,
    *,
    bias: Float[Array, "#b n t t"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Queries:
    """Attends from each token to all non-padding tokens of its row.

    Computes ``softmax(scale * query keyᵀ + bias) value`` over keys ``|t - s| < window``
    of equal segments; the softmax is in float32.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``, where ``k`` divides ``n``.
      value: ``[b, t, k, h]``.
      mask: ``[b, t]``, False for padding, or None if there is none.
      bias: added to the scores, ``[b, n, t, t]`` or ``[1, n, t, t]`` for every row, or
        None; the backward pass computes scores again, and all of a layer's at once.
      window: how far from itself a query sees, its own place included; None: all.
      scale: factor of the scores; ``1 / √h`` if None.
      segment_ids: ``[b, t]``, the example each token belongs to, or 0 for padding. Like
        window and scale, not beside a bias.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.

    Raises:
      ValueError: if a bias is given beside a window, a scale or segments.
    """
    t, h = query.shape[1], query.shape[3]
    whole = None if mask is None else mask[:, None, None, :]
    if bias is not None:
        if (window, scale) != (None, None) or segment_ids is not None:
            raise ValueError(
                "window must be None (scale and segment_ids too) where there is a "
                f"bias; got {window}. Give the bias -inf where a query doesn't see a "
                "key, and scale the queries."
            )
        return plain_attention(query, key, value, bias=bias, mask=whole)
    is_plain = window is None and scale is None and segment_ids is None
    if is_plain and choose_implementation(query, key, mask=whole) == "cudnn":
        return attention(query, key, value, mask=whole)
    factor: float = h**-0.5 if scale is None else scale
    options = Options(scale=factor, is_causal=False, size=block_size(t))
    mask_inputs = MaskInputs(keys=mask, segment_ids=segment_ids)
    if isinstance(window, int):
        options = options._replace(window=window)
    elif window is not None:
        mask_inputs = mask_inputs._replace(window=window)
    return blockwise_attention(query, key, value, options, mask_inputs)


def plain_attention(
    query: Queries,
    key: Keys,
    value: Keys,
    *,
    bias: Float[Array, "_ n t s"] | None = None,
    mask: Bool[Array, "_ _ _ s"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Queries:
    """Attends with any bias and mask, to as many keys as there are.

    Computes ``softmax(scale * query keyᵀ + bias) value``; the softmax is in float32.
    The backward pass computes scores again, and all of a layer's at once.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, s, k, h]``, where ``k`` divides ``n``.
      value: ``[b, s, k, h]``.
      bias: added to the scores, of every row or of each; or None.
      mask: True where a query sees a key.
      is_causal: whether query ``t`` sees keys ``0 ... t`` only.
      scale: factor of the scores; ``1 / √h`` if None.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.
    """
    options: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "scale": scale}
    return jax.checkpoint(lambda q, k, v, b: attention(q, k, v, bias=b, **options))(
        query, key, value, bias
    )


def cached_attention(
    query: Queries,
    key: CachedKeys,
    value: CachedKeys,
    slots: Int[Array, "b t"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    sinks: Float[Array, " n"] | None = None,
) -> Queries:
    """Attends to a KV cache: each query to the slots up to its own.

    Heads come before slots in the cache, the order in which both products read them: in
    the other, a CPU transposes the whole cache for each token.

    Args:
      query: ``[b, t, n, h]``, few tokens.
      key: cached keys ``[b, k, s, h]``; later slots are masked.
      value: cached values ``[b, k, s, h]``.
      slots: ``[b, t]``, the cache slot of each query.
      scale: as in `causal_attention`.
      softcap: as in `causal_attention`.
      window: as in `causal_attention`.
      sinks: as in `causal_attention`.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.
    """
    b, t, n, h = query.shape
    k, s = key.shape[1:3]
    mask = _causal_mask(slots, jnp.arange(s), window)  # [b, 1, t, s]
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(b, k, -1, h)  # all queries of a key head
    scores = jnp.einsum(
        "bkmh,bksh->bkms", rows, key, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(b, k, n // k, t, s) * (h**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(k, n // k, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :s].astype(value.dtype)
    mixed = jnp.einsum("bkms,bksh->bkmh", weights.reshape(b, k, -1, s), value)
    mixed = mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(query.shape)


def write_slots(
    cache: CachedKeys, new: Float[Array, "b t k h"], slots: Int[Array, "b t"]
) -> CachedKeys:
    """Returns a cache ``[b, k, s, h]`` with new tokens' keys or values in its slots."""
    if slots.size == 1:  # written twice: XLA:CPU copies the cache to update one slot
        new, slots = jnp.repeat(new, 2, axis=1), jnp.repeat(slots, 2, axis=1)
    rows = jnp.arange(len(slots))[:, None]
    return cache.at[rows, :, slots].set(new)


def _causal_mask(queries: Array, keys: Array, window) -> Array:
    """Returns the causal mask ``[b, 1, t, s]`` for positions ``[b, t]`` and ``[s]``."""
    distance = queries[:, None, :, None] - keys
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _same_segment(queries: Array, keys: Array) -> Array:
    return queries[:, None, :, None] == keys[:, None, None, :]
