"""Causal attention over rows whose tokens are split over devices (ring attention).

Each device keeps its queries, and the keys and values of all devices pass by, one
device's at a time: after each turn a device hands what it has to the next one. The
softmax is built up as they come, so that no device ever has more than two devices' keys
and values. The backward pass sends them around again, together with their gradients,
which are complete once back at their device.

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
from lora_jax.names import ATTENDED, BATCH_AXES, SEQUENCE, TENSOR, TOKEN_AXES
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
    tokens = Tokens(place, segment_ids)
    window = None if window is None else jnp.asarray(window)
    return _attend((scale, softcap), query, key, value, sinks, tokens, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    factors: tuple[float, float | None],
    query: Array,
    key: Array,
    value: Array,
    sinks: Array | None,
    tokens: Tokens,
    window: Array | None,
) -> Array:
    return _attend_forward(factors, query, key, value, sinks, tokens, window)[0]


def _attend_forward(factors, *operands):
    operands = _tied(operands)
    specs = _specs(operands[1])
    run = jax.shard_map(
        functools.partial(_forward, *factors),
        in_specs=specs.operands,
        out_specs=(specs.heads, specs.totals),
        check_vma=False,  # the loops' first carries vary over no axis
    )
    out, total = (checkpoint_name(x, ATTENDED) for x in run(*operands))
    return out, (operands, out, total)


def _attend_backward(factors, residuals, d_out):
    operands, out, total = residuals
    operands = _tied(operands)
    specs = _specs(operands[1])
    run = jax.shard_map(
        functools.partial(_backward, *factors),
        in_specs=(specs.operands, specs.heads, specs.totals, specs.heads),
        out_specs=specs.operands[:4],
        check_vma=False,
    )
    return (*run(operands, out, total, d_out), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _tied(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the places depend on the queries.

    They are the same in all layers, so JAX would compute the masks of all blocks before
    the loop over scanned layers, and keep them.
    """
    query, key, value, sinks, tokens, window = operands
    query, tokens = jax.lax.optimization_barrier((query, tokens))
    return query, key, value, sinks, tokens, window


class _Specs(NamedTuple):
    """How arrays are split over the mesh.

    Attributes:
      heads: ``[b, t, n, h]``.
      totals: ``[blocks, b, k, m]``.
      operands: the arguments of `_attend`.
    """

    heads: PartitionSpec
    totals: PartitionSpec
    operands: tuple[Any, ...]


def _specs(key: Array) -> _Specs:
    mesh = current_mesh()
    is_split = mesh is not None and key.shape[2] % mesh.shape[TENSOR] == 0
    head = TENSOR if is_split else None
    heads = PartitionSpec(BATCH_AXES, SEQUENCE, head)
    places: Any = (PartitionSpec(SEQUENCE), PartitionSpec(BATCH_AXES, SEQUENCE))
    of_sinks, whole = PartitionSpec(head), PartitionSpec()
    return _Specs(
        heads,
        PartitionSpec(SEQUENCE, BATCH_AXES, head),
        (heads, heads, heads, of_sinks, Tokens(*places), whole),
    )


def _block_size(t: int) -> int:
    divisors = (d for d in range(1, t + 1) if t % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / BLOCK)))


class _Blocks(NamedTuple):
    """What one device has, cut into blocks.

    Attributes:
      options: static options; ``size`` is that of a block.
      queries: ``[blocks, b, k, size g, h]``.
      keys: ``[blocks, b, k, size, h]``.
      values: ``[blocks, b, k, size, h]``.
      places: the tokens of each block.
    """

    options: Options
    queries: Array
    keys: Array
    values: Array
    places: Tokens


def _blocks(scale, softcap, query, key, value, tokens: Tokens) -> _Blocks:
    t, k = key.shape[1:3]
    options = Options(scale, is_causal=True, size=_block_size(t), softcap=softcap)
    rows = (group_heads(query, k), key.swapaxes(1, 2), value.swapaxes(1, 2))
    blocks = t // options.size
    queries, keys, values = (_cut(x, blocks) for x in rows)
    return _Blocks(options, queries, keys, values, _cut_tokens(tokens, blocks))


def _forward(scale, softcap, query, key, value, sinks, tokens: Tokens, window):
    """Attends from one device's queries; returns the result and ``log Σ exp``."""
    options, queries, keys, values, places = _blocks(
        scale, softcap, query, key, value, tokens
    )
    blocks, k = len(keys), key.shape[2]
    top = jnp.full(queries.shape[:-1], LOWEST)
    total, mixed = jnp.zeros_like(top), jnp.zeros(queries.shape, jnp.float32)
    if sinks is not None:
        top = jnp.broadcast_to(_of_rows(sinks, k, options), top.shape)
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
    out = _join(mixed / total[..., None]).astype(query.dtype)
    return ungroup_heads(out, query, k), top + jnp.log(total)


def _backward(scale, softcap, operands, out, total, d_out):
    """Returns the gradients of one device's operands."""
    query, key, value, sinks, tokens, window = operands
    options, queries, keys, values, places = _blocks(
        scale, softcap, query, key, value, tokens
    )
    blocks, k = len(keys), key.shape[2]
    outs, d_outs = (_cut(group_heads(x, k), blocks) for x in (out, d_out))
    inner = jnp.sum(d_outs.astype(jnp.float32) * outs.astype(jnp.float32), axis=-1)

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
        share = jnp.exp(_of_rows(sinks, k, options) - total) * inner  # of the softmax
        share = share.reshape(*share.shape[:3], options.size, -1)
        d_sinks = -jnp.sum(share, axis=(0, 1, 3)).reshape(sinks.shape)
        d_sinks = jax.lax.psum(d_sinks, TOKEN_AXES).astype(sinks.dtype)
    d_query = ungroup_heads(_join(d_queries).astype(query.dtype), query, k)
    d_key, d_value = (_join(x).swapaxes(1, 2).astype(key.dtype) for x in gradients)
    return d_query, d_key, d_value, d_sinks


def _of_rows(sinks: Array, k: int, options: Options) -> Array:
    """Returns the sinks ``[k, size g]`` of a block's queries."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(k, -1), options.size)


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
