"""Causal attention over rows whose tokens are split over devices (ring attention).

Each device keeps its queries, and the keys and values of all devices pass by, one
device's at a time: after each turn a device hands what it has to the next one. The
softmax is built up as they come, so that no device ever has more than two devices' keys
and values. The backward pass sends them around again, together with their gradients,
which are complete when they are home.

On each device the work is done in blocks. Which token sees which is told by the places
of both in their row, so that the tokens may be in any order; pairs of blocks that don't
see each other are skipped.

References:
  Liu et al., https://arxiv.org/abs/2310.01889; Brandon et al.,
  https://arxiv.org/abs/2311.09431, for the order of tokens that shares the work.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.attention.blockwise import (
    LOWEST,
    Options,
    dot,
    group_heads,
    scaled_scores,
    ungroup_heads,
)
from lora_jax.names import ATTENDED, BATCH_AXES, SEQUENCE, TENSOR
from lora_jax.parallel.activation_sharding import current_mesh

BLOCK = 512  # tokens; the divisor of a device's tokens nearest to it is used


class Tokens(NamedTuple):
    """What decides which tokens see each other.

    Attributes:
      place: each token's place in its row ``[t]``.
      segment_ids: ``[b, t]``, the example each token belongs to, or None.
    """

    place: Int[Array, " t"]
    segment_ids: Int[Array, "b t"] | None


def ring_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    place: Int[Array, " t"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    sinks: Float[Array, " n"] | None = None,
) -> Float[Array, "b t n h"]:
    """Computes causal attention on a mesh whose axis ``sequence`` splits the tokens.

    See `lora_jax.attention.causal.causal_attention` for the formula.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``.
      value: ``[b, t, k, h]``.
      place: each token's place in its row ``[t]``; see `lora_jax.parallel.sequence`.
      scale: factor of the scores.
      softcap: bound on the scores, or None.
      window: number of keys a query sees, including its own, or None.
      segment_ids: ``[b, t]``, the example each token belongs to, or None.
      sinks: a score of each head ``[n]`` besides those of the keys, or None.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.

    Raises:
      ValueError: if no mesh with an axis ``sequence`` is in use.
    """
    mesh = current_mesh()
    if mesh is None or SEQUENCE not in mesh.shape:
        raise ValueError(
            "ring_attention needs a mesh with an axis 'sequence'; got "
            f"{'none' if mesh is None else tuple(mesh.shape)}. Use causal_attention."
        )
    is_split = key.shape[2] % mesh.shape[TENSOR] == 0
    heads = TENSOR if is_split else None
    by_head = PartitionSpec(BATCH_AXES, SEQUENCE, heads)
    by_token, whole = PartitionSpec(BATCH_AXES, SEQUENCE), PartitionSpec()
    attend = jax.shard_map(
        functools.partial(_on_device, scale, softcap),
        in_specs=(
            by_head,
            by_head,
            by_head,
            PartitionSpec(SEQUENCE),
            by_token,
            whole,
            PartitionSpec(heads),
        ),
        out_specs=by_head,
        check_vma=False,  # the loops' first carries vary over no axis
    )
    window = None if window is None else jnp.asarray(window)
    return attend(query, key, value, place, segment_ids, window, sinks)


def _on_device(
    scale: float,
    softcap: float | None,
    query: Array,
    key: Array,
    value: Array,
    place: Array,
    segment_ids: Array | None,
    window: Array | None,
    sinks: Array | None,
) -> Array:
    """Attends from one device's queries."""
    b, t, k, _ = key.shape
    rows = group_heads(query, k)
    if sinks is not None:
        each = sinks.astype(jnp.float32).reshape(k, -1)
        sinks = jnp.broadcast_to(each, (b, *each.shape))
    options = Options(scale, is_causal=True, size=_block_size(t), softcap=softcap)
    operands = (rows, key.swapaxes(1, 2), value.swapaxes(1, 2), sinks)
    tokens = Tokens(place, segment_ids)
    return ungroup_heads(_attend(options, *operands, tokens, window), query, k)


def _block_size(t: int) -> int:
    divisors = (d for d in range(1, t + 1) if t % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / BLOCK)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: Options, query, key, value, sinks, tokens: Tokens, window: Array | None
) -> Array:
    """``query [b, k, t g, h]``, ``key, value [b, k, t, h]``, ``sinks [b, k, g]``."""
    return _forward(options, query, key, value, sinks, tokens, window)[0]


def _forward(options: Options, query, key, value, sinks, tokens: Tokens, window):
    blocks = key.shape[2] // options.size
    queries, keys, values = (_cut(x, blocks) for x in (query, key, value))
    places = _cut_tokens(tokens, blocks)
    top = jnp.full(queries.shape[:-1], LOWEST)
    total, mixed = jnp.zeros_like(top), jnp.zeros(queries.shape, jnp.float32)
    if sinks is not None:
        top = jnp.broadcast_to(jnp.tile(sinks, options.size), top.shape)
        total = jnp.ones_like(top)

    def turn(_, carry):
        held, state = carry
        following = _hand_on(held)

        def for_queries(xs):
            q, mine, state = xs

            def visit(j, state):
                k, v, others = jax.tree.map(lambda x: x[j], held)
                mask = _mask(mine, others, window)

                def attend(state):
                    mixed, top, total = state
                    scores = scaled_scores("bkth,bksh->bkts", q, k, options)
                    scores = jnp.where(_for_heads(mask, q), scores, LOWEST)
                    higher = jnp.maximum(top, jnp.max(scores, axis=-1))
                    exps = jnp.exp(scores - higher[..., None])
                    fade = jnp.exp(top - higher)
                    added = dot("bkts,bksh->bkth", exps.astype(v.dtype), v)
                    total = total * fade + jnp.sum(exps, axis=-1)
                    return mixed * fade[..., None] + added, higher, total

                return jax.lax.cond(jnp.any(mask), attend, lambda x: x, state)

            return jax.lax.fori_loop(0, blocks, visit, state)

        return following, jax.lax.map(for_queries, (queries, places, state))

    held, state = (keys, values, places), (mixed, top, total)
    _, (mixed, top, total) = jax.lax.fori_loop(0, _size(), turn, (held, state))
    out = checkpoint_name(_join(mixed / total[..., None]).astype(query.dtype), ATTENDED)
    total = checkpoint_name(top + jnp.log(total), ATTENDED)
    return out, (query, key, value, sinks, tokens, window, out, total)


def _backward(options: Options, residuals, d_out):
    query, key, value, sinks, tokens, window, out, total = residuals
    blocks = key.shape[2] // options.size
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inner = _cut(inner[..., None], blocks)[..., 0]  # [blocks, b, k, size g]
    queries, keys, values, d_outs = (
        _cut(x, blocks) for x in (query, key, value, d_out)
    )
    places = _cut_tokens(tokens, blocks)

    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, jnp.float32)

    def turn(_, carry):
        held, gradients, d_queries = carry
        following = _hand_on(held)

        def for_queries(gradients, xs):
            q, d_o, total, inner, mine, d_q = xs

            def visit(j, carry):
                k, v, others = jax.tree.map(lambda x: x[j], held)
                mask = _mask(mine, others, window)

                def add(carry):
                    (d_keys, d_values), d_q = carry
                    scores = scaled_scores("bkth,bksh->bkts", q, k, options)
                    log_p = scores - total[..., None]
                    p = jnp.exp(jnp.where(_for_heads(mask, q), log_p, -jnp.inf))
                    d_p = dot("bkth,bksh->bkts", d_o, v)
                    d_s = p * (d_p - inner[..., None])
                    if options.softcap is not None:
                        d_s *= 1 - jnp.square(scores / options.softcap)
                    d_s = (d_s * options.scale).astype(q.dtype)
                    d_v = dot("bkts,bkth->bksh", p.astype(v.dtype), d_o)
                    d_k = dot("bkts,bkth->bksh", d_s, q)
                    gradients = d_keys.at[j].add(d_k), d_values.at[j].add(d_v)
                    return gradients, d_q + dot("bkts,bksh->bkth", d_s, k)

                return jax.lax.cond(jnp.any(mask), add, lambda x: x, carry)

            return jax.lax.fori_loop(0, blocks, visit, (gradients, d_q))

        xs = (queries, d_outs, total, inner, places, d_queries)
        gradients, d_queries = jax.lax.scan(for_queries, gradients, xs)
        return following, _hand_on(gradients), d_queries

    start = ((keys, values, places), (zeros(keys), zeros(values)), zeros(queries))
    _, gradients, d_queries = jax.lax.fori_loop(0, _size(), turn, start)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(jnp.tile(sinks, options.size) - total)  # of the softmax
        d_sinks = -jnp.sum(
            (share * inner).reshape(blocks, *sinks.shape[:2], options.size, -1),
            axis=(0, 3),
        )
    d_key, d_value = (_join(x) for x in gradients)
    return (
        _join(d_queries).astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        d_sinks,
        None,
        None,
    )


_attend.defvjp(_forward, _backward)


def _size() -> int:
    return jax.lax.axis_size(SEQUENCE)


def _hand_on(held: Any) -> Any:
    """Gives each device what the one before it has."""
    routes = [(i, (i + 1) % _size()) for i in range(_size())]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE, routes), held)


def _cut(x: Array, blocks: int) -> Array:
    """Returns ``[blocks, b, k, t / blocks, h]`` for ``[b, k, t, h]``."""
    b, k, t, h = x.shape
    return jnp.moveaxis(x.reshape(b, k, blocks, t // blocks, h), 2, 0)


def _join(x: Array) -> Array:
    """Undoes `_cut`."""
    blocks, b, k, size, h = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, k, blocks * size, h)


def _cut_tokens(tokens: Tokens, blocks: int) -> Tokens:
    """Returns the tokens of each block, ``[blocks, ...]``."""
    ids = tokens.segment_ids
    if ids is not None:
        ids = jnp.moveaxis(ids.reshape(len(ids), blocks, -1), 1, 0)
    return Tokens(tokens.place.reshape(blocks, -1), ids)


def _mask(queries: Tokens, keys: Tokens, window: Array | None) -> Array:
    """Returns the mask ``[b or 1, t, s]`` of two blocks, True = visible."""
    distance = queries.place[:, None] - keys.place
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if queries.segment_ids is None or keys.segment_ids is None:
        return mask[None]
    return mask & (queries.segment_ids[..., None] == keys.segment_ids[:, None])


def _for_heads(mask: Array, query: Array) -> Array:
    """Repeats a mask ``[b or 1, t, s]`` for queries ``[b, k, t g, h]``."""
    return jnp.repeat(mask, query.shape[2] // mask.shape[1], axis=1)[:, None]
