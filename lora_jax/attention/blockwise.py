"""Self-attention in blocks, forward and backward, that keeps no scores.

The forward pass takes the queries a block at a time, each against the keys that it may
see (if causal, those up to its own end). Kept for the backward pass are its operands,
its result and one number a query, ``log Σ exp(score)``. The backward pass takes the
keys a block at a time, each against the queries that may see it, and makes their
probabilities again, from ``K Qᵀ``: the compiler can't take that for the forward pass's
``Q Kᵀ``, and so keeps neither. On a CPU long rows do both in a loop, a few heads at a
time.

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
CACHE_BYTES = 2**19  # of scores at once, on a CPU
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Options(NamedTuple):
    """What is static of an attention.

    Attributes:
      scale: of the scores.
      is_causal: whether a query sees no later keys.
      softcap: bound of the scores, or None.
      window: keys that a query sees, itself included, or None; causal only.
      size: tokens of a block.
    """

    scale: float
    is_causal: bool
    size: int
    softcap: float | None = None
    window: int | None = None

    def blocks(self, t: int) -> list[tuple[int, int]]:
        """Returns the first token of each block and the one after its last."""
        return [(i, min(i + self.size, t)) for i in range(0, t, self.size)]

    def keys_of(self, start: int, stop: int, t: int) -> tuple[int, int]:
        """Returns the range of keys that queries ``start ... stop - 1`` may see."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return first, stop if self.is_causal else t

    def queries_of(self, start: int, stop: int, t: int) -> tuple[int, int]:
        """Returns the range of queries that may see keys ``start ... stop - 1``."""
        last = t if self.window is None else min(t, stop - 1 + self.window)
        return start if self.is_causal else 0, last


class MaskInputs(NamedTuple):
    """What is traced of the mask.

    Attributes:
      window: as in `Options`, an array, or None.
      segment_ids: ``[b, t]`` example of each token, or None.
      keys: ``[b, t]``, False for keys that no query sees (padding), or None.
    """

    window: Int[Array, ""] | None = None
    segment_ids: Int[Array, "b t"] | None = None
    keys: Bool[Array, "b t"] | None = None


def block_size(t: int) -> int:
    """Returns how many tokens to take at once: few blocks, small enough for a cache."""
    return max(MIN_BLOCK, -(-t // MAX_BLOCKS))


def blockwise_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    options: Options,
    seen: MaskInputs,
) -> Float[Array, "b t n h"]:
    """Computes ``softmax(cap(scale * query keyᵀ)) value`` over the keys that are seen.

    The softmax is in float32. A query that sees no key gets the mean of those in reach.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``.
      value: ``[b, t, k, h]``.
      options: what is static.
      seen: what is traced.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    rows = query.reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(b, k, t * (n // k), h)  # the group of a key head side by side
    operands = (rows, key.swapaxes(1, 2), value.swapaxes(1, 2))
    parts = _parts(options, b * k, options.size * (n // k), t)
    if parts > 1:
        out: Any = _in_turn(options, operands, seen, parts)
    else:
        out = _attend(options, *operands, seen)
    out = out.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4)
    return out.reshape(query.shape)


def _parts(options: Options, heads: int, queries: int, keys: int) -> int:
    """Returns into how many parts to cut the key heads of all rows.

    On a CPU scores of one part after the other stay in its cache, and take less memory.
    Not on several devices, where a loop would move what lies on them all; nor for rows
    of one block, where there is too little to gain.
    """
    if keys <= MIN_BLOCK or target_platform() != "cpu" or jax.device_count() > 1:
        return 1
    wanted = heads * queries * keys * 4 / CACHE_BYTES
    return next(
        n for n in range(1, heads + 1) if heads % n == 0 and (n >= wanted or n == heads)
    )


def _in_turn(options: Options, operands, seen: MaskInputs, parts: int) -> Array:
    """`_attend`, a part of the key heads of all rows after the other."""
    b, k = operands[0].shape[:2]

    def cut(x: Array) -> Array:
        return x.reshape(parts, b * k // parts, 1, *x.shape[2:])

    def of_heads(x: Array) -> Array:  # [b, t]
        return jnp.repeat(x, k, axis=0).reshape(parts, -1, x.shape[1])

    by_row = jax.tree.map(of_heads, seen._replace(window=None))
    return jax.lax.map(
        lambda xs: _attend(options, *xs[0], xs[1]._replace(window=seen.window)),
        (tuple(map(cut, operands)), by_row),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, query, key, value, seen: MaskInputs) -> Array:
    """``query [b, k, t g, h]``, ``key, value [b, k, t, h]``."""
    return _forward(options, query, key, value, seen)[0]


def _forward(options: Options, query, key, value, seen: MaskInputs):
    t = key.shape[2]
    g = query.shape[2] // t
    outs, totals = [], []
    for start, stop in options.blocks(t):
        reach = options.keys_of(start, stop, t)
        q = query[:, :, start * g : stop * g]
        k, v = (x[:, :, slice(*reach)] for x in (key, value))
        scores = _scores("bkth,bksh->bkts", q, k, options)
        mask = _mask((start, stop), reach, options, seen)  # [b or 1, t, s]
        if mask is not None:
            scores = jnp.where(_for_group(mask, g)[:, None], scores, _LOWEST)
        top = jnp.max(scores, axis=-1, keepdims=True)
        exps = jnp.exp(scores - top)
        total = jnp.sum(exps, axis=-1, keepdims=True)
        mixed = _dot("bkts,bksh->bkth", exps.astype(v.dtype), v)
        outs.append((mixed / total).astype(q.dtype))
        totals.append((top + jnp.log(total))[..., 0])
    out, total = (
        checkpoint_name(jnp.concatenate(parts, axis=2), ATTENDED)
        for parts in (outs, totals)
    )
    return out, (query, key, value, seen, out, total)


def _backward(options: Options, residuals, d_out):
    query, key, value, seen, out, total = residuals
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
        scores = _scores("bksh,bkth->bkst", k, q, options)
        log_p = scores - total[:, :, None, rows]
        mask = _mask(reach, (start, stop), options, seen)
        if mask is not None:
            mask = _for_group(mask, g).swapaxes(1, 2)[:, None]  # [b, 1, s, t g]
            log_p = jnp.where(mask, log_p, -jnp.inf)
        p = jnp.exp(log_p)
        d_p = _dot("bksh,bkth->bkst", v, d_o)
        d_s = p * (d_p - inner[:, :, None, rows])
        if options.softcap is not None:
            d_s *= 1 - jnp.square(scores / options.softcap)
        d_s = (d_s * options.scale).astype(q.dtype)
        d_values.append(_dot("bkst,bkth->bksh", p.astype(v.dtype), d_o))
        d_keys.append(_dot("bkst,bkth->bksh", d_s, q))
        d_query = d_query.at[:, :, rows].add(_dot("bkst,bksh->bkth", d_s, k))
    d_key, d_value = (jnp.concatenate(x, axis=2) for x in (d_keys, d_values))
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _scores(equation: str, x: Array, y: Array, options: Options) -> Array:
    """The scaled and bounded scores, in float32."""
    scores = _dot(equation, x, y) * options.scale
    cap = options.softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _mask(
    queries: tuple[int, int], keys: tuple[int, int], options: Options, seen: MaskInputs
) -> Array | None:
    """Which keys these queries may see: boolean ``[b or 1, t or 1, s]``; None: all."""
    masks = []
    if options.is_causal:
        distance = jnp.arange(*queries)[:, None] - jnp.arange(*keys)
        masks.append((distance >= 0)[None])
        windows = [w for w in (options.window, seen.window) if w is not None]
        masks += [(distance < window)[None] for window in windows]
    if seen.segment_ids is not None:
        of_queries = seen.segment_ids[:, slice(*queries), None]
        masks.append(of_queries == seen.segment_ids[:, None, slice(*keys)])
    if seen.keys is not None:
        masks.append(seen.keys[:, None, slice(*keys)])
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _for_group(mask: Array, g: int) -> Array:
    """Repeats the rows of a mask for the queries that share a key head."""
    return mask if mask.shape[1] == 1 else jnp.repeat(mask, g, axis=1)
