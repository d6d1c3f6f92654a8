"""Blockwise self-attention, forward and backward, that never stores the scores.

The forward pass processes the queries block by block, each against the keys visible to
it (if causal, those up to the block's end). The residuals are the operands, the result
and one number per query, ``log Σ exp(score)``. The backward pass processes the keys
block by block, each against the queries that see it, and recomputes the probabilities
from ``K Qᵀ``: the compiler can't recognise the forward pass's ``Q Kᵀ`` in it, so it
stores neither. On a TPU both are ``K Qᵀ``, with a barrier between them; on a CPU both
passes loop over a few heads at a time for long rows.

References:
  Dao et al., https://arxiv.org/abs/2205.14135, algorithms 1 and 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lora_jax.names import ATTENDED
from lora_jax.parallel.activation_sharding import target_platform

MIN_BLOCK, MAX_BLOCKS = 64, 16
CACHE_BYTES = 2**19  # size of the scores computed at once on a CPU
LOWEST = float(jnp.finfo(jnp.float32).min)


class Options(NamedTuple):
    """Static attention options.

    Attributes:
      scale: factor of the scores.
      is_causal: whether later keys are masked.
      size: block size in tokens.
      softcap: bound on the scores, or None.
      window: number of keys a query sees, including its own, or None; without
        causality as many on either side.
    """

    scale: float
    is_causal: bool
    size: int
    softcap: float | None = None
    window: int | None = None

    def blocks(self, t: int) -> list[tuple[int, int]]:
        """Returns the start and end of each block."""
        return [(i, min(i + self.size, t)) for i in range(0, t, self.size)]

    def keys_of(self, start: int, stop: int, t: int) -> tuple[int, int]:
        """Returns the range of keys visible to queries ``start ... stop - 1``."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        last = t if self.window is None else min(t, stop - 1 + self.window)
        return first, stop if self.is_causal else last

    def queries_of(self, start: int, stop: int, t: int) -> tuple[int, int]:
        """Returns the range of queries that see keys ``start ... stop - 1``."""
        last = t if self.window is None else min(t, stop - 1 + self.window)
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return start if self.is_causal else first, last


class MaskInputs(NamedTuple):
    """The arrays that define the attention mask.

    Attributes:
      window: as in `Options` but traced, or None.
      segment_ids: ``[b, t]``, the example each token belongs to, or None.
      keys: ``[b, t]``, False for padding keys, or None.
    """

    window: Int[Array, ""] | None = None
    segment_ids: Int[Array, "b t"] | None = None
    keys: Bool[Array, "b t"] | None = None


def block_size(t: int) -> int:
    """Returns the block size in tokens: few blocks, each small enough for the cache."""
    return max(MIN_BLOCK, -(-t // MAX_BLOCKS))


def blockwise_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    options: Options,
    mask_inputs: MaskInputs,
    sinks: Float[Array, " n"] | None = None,
) -> Float[Array, "b t n h"]:
    """Computes ``softmax(cap(scale * query keyᵀ)) value`` over the visible keys.

    The softmax is in float32. A query whose keys are all masked gets the mean over the
    keys in its causal range.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``.
      value: ``[b, t, k, h]``.
      options: the static options.
      mask_inputs: the mask.
      sinks: a score of each head ``[n]`` that its softmax has besides those of the
        keys, with a value of zero; or None.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.
    """
    b, t, n, _ = query.shape
    k = key.shape[2]
    rows = group_heads(query, k)
    operands = (rows, key.swapaxes(1, 2), value.swapaxes(1, 2))
    if sinks is not None:
        each = sinks.astype(jnp.float32).reshape(k, n // k)
        operands = (*operands, jnp.broadcast_to(each, (b, *each.shape)))
    else:
        operands = (*operands, None)
    chunks = _num_chunks(options, b * k, options.size * (n // k), t)
    if chunks > 1:
        out: Any = _attend_in_chunks(options, operands, mask_inputs, chunks)
    else:
        out = _attend(options, *operands, mask_inputs)
    return ungroup_heads(out, query, k)


def group_heads(query: Float[Array, "b t n h"], k: int) -> Float[Array, "b k m h"]:
    """Returns ``[b, k, t g, h]``: query heads of one key head are adjacent rows."""
    b, t, n, h = query.shape
    rows = query.reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4)
    return rows.reshape(b, k, t * (n // k), h)


def ungroup_heads(
    rows: Array, query: Float[Array, "b t n h"], k: int
) -> Float[Array, "b t n h"]:
    """Undoes `group_heads`; ``rows`` may have their first axes in any shape."""
    b, t, n, h = query.shape
    rows = rows.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4)
    return rows.reshape(query.shape)


def _num_chunks(options: Options, heads: int, queries: int, keys: int) -> int:
    """Returns the number of chunks to split the key heads of all rows into.

    On a CPU the scores of one chunk fit in the cache, which also saves memory. Not
    chunked on several devices, where the loop would move sharded data, nor for rows of
    a single block, where there is little to gain.
    """
    if keys <= MIN_BLOCK or target_platform() != "cpu" or jax.device_count() > 1:
        return 1
    wanted = heads * queries * keys * 4 / CACHE_BYTES
    return next(
        n for n in range(1, heads + 1) if heads % n == 0 and (n >= wanted or n == heads)
    )


def _attend_in_chunks(
    options: Options, operands, mask_inputs: MaskInputs, chunks: int
) -> Array:
    """Runs `_attend` on one chunk of the key heads at a time."""
    b, k = operands[0].shape[:2]

    def cut(x: Array | None) -> Array | None:
        if x is None:
            return None
        return x.reshape(chunks, b * k // chunks, 1, *x.shape[2:])

    def for_heads(x: Array) -> Array:  # [b, t]
        return jnp.repeat(x, k, axis=0).reshape(chunks, -1, x.shape[1])

    by_row = jax.tree.map(for_heads, mask_inputs._replace(window=None))
    return jax.lax.map(
        lambda xs: _attend(options, *xs[0], xs[1]._replace(window=mask_inputs.window)),
        (tuple(map(cut, operands)), by_row),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: Options, query, key, value, sinks, mask_inputs: MaskInputs
) -> Array:
    """``query [b, k, t g, h]``, ``key, value [b, k, t, h]``, ``sinks [b, k, g]``."""
    return _forward(options, query, key, value, sinks, mask_inputs)[0]


def _forward(options: Options, query, key, value, sinks, mask_inputs: MaskInputs):
    t = key.shape[2]
    g = query.shape[2] // t
    outs, totals = [], []
    is_turned = _puts_keys_first()
    axis = 2 if is_turned else 3  # of the keys
    for start, stop in options.blocks(t):
        reach = options.keys_of(start, stop, t)
        q = query[:, :, start * g : stop * g]
        k, v = (x[:, :, slice(*reach)] for x in (key, value))
        if is_turned:
            scores = scaled_scores("bksh,bkth->bkst", k, q, options)
        else:
            scores = scaled_scores("bkth,bksh->bkts", q, k, options)
        mask = _mask((start, stop), reach, options, mask_inputs)  # [b or 1, t, s]
        if mask is not None:
            mask = _for_group(mask, g)[:, None]
            mask = mask.swapaxes(2, 3) if is_turned else mask
            scores = jnp.where(mask, scores, LOWEST)
        top = jnp.max(scores, axis=axis, keepdims=True)
        if sinks is not None:
            sink = jnp.expand_dims(jnp.tile(sinks, stop - start), axis)
            top = jnp.maximum(top, sink)
        exps = jnp.exp(scores - top)
        total = jnp.sum(exps, axis=axis, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sink - top)
        equation = "bkst,bksh->bkth" if is_turned else "bkts,bksh->bkth"
        mixed = dot(equation, exps.astype(v.dtype), v)
        outs.append((mixed / total.squeeze(axis)[..., None]).astype(q.dtype))
        totals.append((top + jnp.log(total)).squeeze(axis))
    out, total = (
        checkpoint_name(jnp.concatenate(blocks, axis=2), ATTENDED)
        for blocks in (outs, totals)
    )
    return out, (query, key, value, sinks, mask_inputs, out, total)


def _backward(options: Options, residuals, d_out):
    query, key, value, sinks, mask_inputs, out, total = residuals
    if _puts_keys_first():  # or the compiler would keep the forward pass's scores
        query, key = jax.lax.optimization_barrier((query, key))
    t = key.shape[2]
    g = query.shape[2] // t
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_query = jnp.zeros(query.shape, jnp.float32)
    d_keys, d_values = [], []
    for start, stop in options.blocks(t):
        reach = options.queries_of(start, stop, t)
        rows = slice(reach[0] * g, reach[1] * g)
        q, d_o = query[:, :, rows], d_out[:, :, rows]
        k, v = key[:, :, start:stop], value[:, :, start:stop]
        scores = scaled_scores("bksh,bkth->bkst", k, q, options)
        log_p = scores - total[:, :, None, rows]
        mask = _mask(reach, (start, stop), options, mask_inputs)
        if mask is not None:
            mask = _for_group(mask, g).swapaxes(1, 2)[:, None]  # [b, 1, s, t g]
            log_p = jnp.where(mask, log_p, -jnp.inf)
        p = jnp.exp(log_p)
        d_p = dot("bksh,bkth->bkst", v, d_o)
        d_s = p * (d_p - inner[:, :, None, rows])
        if options.softcap is not None:
            d_s *= 1 - jnp.square(scores / options.softcap)
        d_s = (d_s * options.scale).astype(q.dtype)
        d_values.append(dot("bkst,bkth->bksh", p.astype(v.dtype), d_o))
        d_keys.append(dot("bkst,bkth->bksh", d_s, q))
        d_query = d_query.at[:, :, rows].add(dot("bkst,bksh->bkth", d_s, k))
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(jnp.tile(sinks, t) - total)  # of the softmax
        d_sinks = -jnp.sum((share * inner).reshape(*sinks.shape[:2], t, g), axis=2)
    d_key, d_value = (jnp.concatenate(x, axis=2) for x in (d_keys, d_values))
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        d_sinks,
        None,
    )


_attend.defvjp(_forward, _backward)


def _puts_keys_first() -> bool:
    """Returns whether the forward pass's scores are ``K Qᵀ``, as the backward's are.

    On a TPU they are: a query's largest score and their sum then lie along the lanes,
    and sums over keys add up vectors. By the compiler's estimate a step of MiniLM with
    two layers and 32 x 32 tokens takes 0.75 million cycles on v6e, 0.82 otherwise.
    """
    return target_platform() == "tpu"


def scaled_scores(equation: str, x: Array, y: Array, options: Options) -> Array:
    """Returns the scaled and capped scores, in float32."""
    scores = dot(equation, x, y) * options.scale
    cap = options.softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def dot(equation: str, x: Array, y: Array) -> Array:
    """Returns an einsum, in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _mask(
    queries: tuple[int, int],
    keys: tuple[int, int],
    options: Options,
    mask_inputs: MaskInputs,
) -> Array | None:
    """Returns the mask ``[b or 1, t or 1, s]``, True = visible, or None if all are."""
    masks = []
    distance = jnp.arange(*queries)[:, None] - jnp.arange(*keys)
    if options.is_causal:
        masks.append((distance >= 0)[None])
    windows = [w for w in (options.window, mask_inputs.window) if w is not None]
    masks += [(jnp.abs(distance) < window)[None] for window in windows]
    if mask_inputs.segment_ids is not None:
        of_queries = mask_inputs.segment_ids[:, slice(*queries), None]
        masks.append(of_queries == mask_inputs.segment_ids[:, None, slice(*keys)])
    if mask_inputs.keys is not None:
        masks.append(mask_inputs.keys[:, None, slice(*keys)])
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _for_group(mask: Array, g: int) -> Array:
    """Repeats the rows of a mask for the query heads that share a key head."""
    return mask if mask.shape[1] == 1 else jnp.repeat(mask, g, axis=1)
