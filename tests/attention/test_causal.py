"""Blockwise causal attention equals softmax attention with a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.attention.blockwise import MIN_BLOCK
from lora_jax.attention.causal import cached_attention, causal_attention

T = 2 * MIN_BLOCK + 9  # three blocks, the last one short


def arrays(t=T):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, t, 4, 6), (2, t, 2, 6), (2, t, 2, 6)]
    return [2 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def oracle(query, key, value, scale=None, softcap=None, window=None, segments=None):
    """Float64, one head and one query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    out = np.zeros_like(query)
    for row, head, i in np.ndindex(b, n, t):
        seen = [
            j
            for j in range(i + 1)
            if (window is None or i - j < window)
            and (segments is None or segments[row, i] == segments[row, j])
        ]
        keys = key[row, seen, head // (n // key.shape[2])]
        scores = keys @ query[row, i, head] * (scale or h**-0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        values = value[row, seen, head // (n // key.shape[2])]
        out[row, i, head] = weights / weights.sum() @ values
    return out


SEGMENTS = np.sort(np.random.default_rng(0).integers(1, 5, (2, T)), axis=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.2, "softcap": 3.0},
        {"window": 5},
        {"window": MIN_BLOCK + 3, "softcap": 5.0},
        {"segments": SEGMENTS},
        {"segments": SEGMENTS, "window": 7},
    ],
    ids=["plain", "softcap", "window", "wide-window", "packed", "packed-window"],
)
def test_blocks_equal_the_masked_softmax(options):
    query, key, value = arrays()
    wanted = oracle(query, key, value, **options)
    segments = options.pop("segments", None)
    segment_ids = None if segments is None else jnp.asarray(segments)
    attend = functools.partial(causal_attention, segment_ids=segment_ids, **options)
    got = jax.jit(attend)(query, key, value)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    if "window" in options:  # traced, as scanned layers have it
        window = jnp.asarray(options.pop("window"))
        attend.keywords.pop("window")
        traced = jax.jit(attend)(query, key, value, window=window)
        np.testing.assert_allclose(traced, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.optimized
def test_future_keys_cost_no_flops():
    query, key, value = arrays(16 * MIN_BLOCK)
    blocks = jax.jit(causal_attention).lower(query, key, value).compile()
    full = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    )
    whole = full.lower(query, key, value).compile()
    ratio = blocks.cost_analysis()["flops"] / whole.cost_analysis()["flops"]
    assert ratio < 0.6  # (16 + 1) / (2 * 16) = 0.53 of the score matrix


def test_future_keys_get_no_gradient():
    query, key, value = arrays()

    def one_row(key, value):
        return causal_attention(query, key, value)[:, 70].sum()

    d_key, d_value = jax.jit(jax.grad(one_row, argnums=(0, 1)))(key, value)
    assert not np.any(d_key[:, 71:])
    assert not np.any(d_value[:, 71:])
    assert np.all(np.any(d_value[:, :71], axis=(2, 3)))


@pytest.mark.parametrize("window", [None, 4])
def test_cached_attention_matches_the_whole_sequence(window):
    query, key, value = arrays(12)
    options = {"window": window, "softcap": 4.0}
    attend = jax.jit(functools.partial(causal_attention, **options))
    whole = attend(query, key, value)
    slots = jnp.array([[3, 4], [9, 10]])
    rows = jnp.arange(2)[:, None]
    junk = jnp.full((2, 5, 2, 6), jnp.nan).at[:].set(1e3)
    cached = jax.jit(functools.partial(cached_attention, **options))(
        query[rows, slots],
        jnp.concatenate([key, junk], axis=1).swapaxes(1, 2),
        jnp.concatenate([value, junk], axis=1).swapaxes(1, 2),
        slots,
    )
    np.testing.assert_allclose(cached, whole[rows, slots], rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16():
    halves = [x.astype(jnp.bfloat16) for x in arrays()]
    got = jax.jit(causal_attention)(*halves)
    assert got.dtype == jnp.bfloat16
    wanted = oracle(*(np.asarray(x, np.float64) for x in halves))
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_a_part_of_each_heads_softmax(window):
    b, t, n, k, h = 2, 5, 4, 2, 6
    draw = np.random.default_rng(0).normal
    shapes = ((b, t, n, h), (b, t, k, h), (b, t, k, h), (n,))
    arrays = tuple(jnp.float32(draw(size=shape)) for shape in shapes)
    dy = jnp.float32(draw(size=shapes[0]))
    slots = jnp.broadcast_to(jnp.arange(t), (b, t))

    def by_hand(query, key, value, sinks):
        key, value = (jnp.repeat(x, n // k, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * h**-0.5
        distance = jnp.arange(t)[:, None] - jnp.arange(t)
        seen = (distance >= 0) & (distance < (window or t))
        exps = jnp.where(seen, jnp.exp(scores), 0)
        total = exps.sum(axis=-1) + jnp.exp(sinks)[:, None]
        return jnp.einsum("bnts,bsnh->btnh", exps / total[..., None], value)

    def blockwise(*arrays):
        return causal_attention(*arrays[:3], sinks=arrays[3], window=window)

    def cached(*arrays):
        query, key, value, sinks = arrays
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        return cached_attention(query, key, value, slots, sinks=sinks, window=window)

    wanted = by_hand(*arrays)
    slopes = jax.vjp(by_hand, *arrays)[1](dy)
    for attend in (blockwise, cached):
        got, pull = jax.vjp(attend, *arrays)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        for slope, want in zip(pull(dy), slopes, strict=True):
            np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-5)
