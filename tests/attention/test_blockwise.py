"""Blockwise attention has the same values and gradients as full attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.attention import blockwise
from lora_jax.attention.blockwise import (
    MIN_BLOCK,
    MaskInputs,
    Options,
    blockwise_attention,
    dot,
)
from lora_jax.attention.causal import bidirectional_attention, causal_attention

T = 2 * MIN_BLOCK + 9  # three blocks, the last one short
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, T)), axis=1))
PADDED = jnp.arange(T) < jnp.array([[T], [T - 20]])


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, 4, 6), (2, T, 2, 6), (2, T, 2, 6), (2, T, 4, 6)]
    drawn = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return [x.astype(dtype) for x in drawn]


def written_out(query, key, value, options, seen):
    """Attention with the full score matrix, in the dtype of the arrays."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = jnp.ones((1, T, T), bool)
    if options.is_causal:
        mask = mask & (distance >= 0)
        for window in (options.window, seen.window):
            mask = mask if window is None else mask & (distance < window)
    elif options.window is not None:
        mask = mask & (jnp.abs(distance) < options.window)
    if seen.segment_ids is not None:
        mask = mask & (seen.segment_ids[:, :, None] == seen.segment_ids[:, None])
    if seen.keys is not None:
        mask = mask & seen.keys[:, None]
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)


CAUSAL = Options(scale=0.3, is_causal=True, size=MIN_BLOCK)
ENCODER = CAUSAL._replace(is_causal=False)
PACKED = MaskInputs(segment_ids=SEGMENTS)
CASES = {
    "causal": (CAUSAL, MaskInputs()),
    "softcap": (CAUSAL._replace(softcap=1.5), MaskInputs()),
    "window": (CAUSAL._replace(window=5), MaskInputs()),
    "wide-window": (CAUSAL._replace(window=MIN_BLOCK + 3), MaskInputs()),
    "traced-window": (CAUSAL, MaskInputs(window=jnp.array(5))),
    "packed": (CAUSAL, PACKED),
    "all": (ENCODER, MaskInputs()),
    "padded": (ENCODER, MaskInputs(keys=PADDED)),
    "both-sides": (ENCODER._replace(window=5), MaskInputs()),
    "wide-both-sides": (ENCODER._replace(window=MIN_BLOCK + 3), MaskInputs()),
}


def value_and_gradients(attend, arrays, *rest):
    @jax.jit
    def run(direction, *operands):
        out, pull = jax.vjp(lambda *xs: attend(*xs, *rest), *operands)
        return out, *pull(direction)

    *operands, direction = arrays
    return run(direction, *operands)


TRIALS = [
    pytest.param(*case, cache, id=f"{name}{how}")
    for name, case in CASES.items()
    for how, cache in {"": 2**40, "-in-turn": 1}.items()
]


@pytest.mark.parametrize(("options", "seen", "cache"), TRIALS)
def test_values_and_gradients_match_the_full_score_matrix(
    options, seen, cache, monkeypatch
):
    monkeypatch.setattr(blockwise, "CACHE_BYTES", cache)
    drawn = arrays()
    got = value_and_gradients(blockwise_attention, drawn, options, seen)
    with jax.enable_x64():
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in drawn]
        wanted = value_and_gradients(written_out, exact, options, seen)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "seen", "has_sinks"),
    [
        pytest.param(CAUSAL._replace(softcap=1.5, window=70), PACKED, True, id="sinks"),
        pytest.param(ENCODER, MaskInputs(keys=PADDED), False, id="padded"),
    ],
)
def test_a_tpus_order_of_axes_changes_no_value(options, seen, has_sinks, monkeypatch):
    drawn = arrays()
    sinks = (jnp.arange(4.0) - 1,) if has_sinks else ()

    def results():
        def attend(query, key, value, *sinks):
            operands = (query, key, value, options, seen, *sinks)
            return blockwise_attention(*operands)

        return value_and_gradients(attend, [*drawn[:3], *sinks, drawn[3]])

    wanted = results()
    turned = []
    monkeypatch.setattr(blockwise, "target_platform", lambda: "tpu")
    monkeypatch.setattr(
        blockwise,
        "dot",
        lambda equation, *xs: turned.append(equation) or dot(equation, *xs),
    )
    for a, b in zip(results(), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert "bkth,bksh->bkts" not in turned


def test_on_a_cpu_long_rows_process_their_heads_in_chunks():
    def temporaries(cache):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blockwise, "CACHE_BYTES", cache)
            x = jax.ShapeDtypeStruct((2, 8 * MIN_BLOCK, 4, 8), jnp.float32)
            step = jax.grad(lambda q, k, v: causal_attention(q, k, v).sum(), (0, 1, 2))
            compiled = jax.jit(step).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(blockwise.CACHE_BYTES) < temporaries(2**40) / 2


@pytest.mark.parametrize(
    ("options", "heads", "keys", "chunks"),
    [
        pytest.param(CAUSAL, 16, 512, 4, id="cut to the cache"),
        pytest.param(CAUSAL, 14, 512, 7, id="equal chunks"),
        pytest.param(CAUSAL, 2, 2**20, 2, id="a head at least"),
        pytest.param(CAUSAL, 16, MIN_BLOCK, 1, id="one block"),
        pytest.param(ENCODER, 16, 512, 4, id="encoder"),
        pytest.param(ENCODER, 16, 2 * MIN_BLOCK, 1, id="encoder, one part"),
        pytest.param(ENCODER, 64, 2 * MIN_BLOCK, 4, id="encoder, two blocks"),
    ],
)
def test_chunks_divide_the_heads(options, heads, keys, chunks):
    assert blockwise._num_chunks(options, heads, MIN_BLOCK, keys) == chunks


def test_no_scores_are_saved_for_the_backward_pass():
    def loss(query, key, value):
        return blockwise_attention(query, key, value, CAUSAL, MaskInputs()).sum()

    operands = arrays()[:3]
    kept = jax.eval_shape(lambda *xs: jax.vjp(loss, *xs)[1], *operands)
    largest = max(leaf.size for leaf in jax.tree.leaves(kept))
    assert largest == operands[0].size < 2 * 4 * T * T


def test_half_precision_is_preserved_and_gradients_are_close():
    *halves, direction = arrays(jnp.bfloat16)
    got = value_and_gradients(
        blockwise_attention,
        [*halves, direction],
        CAUSAL,
        MaskInputs(segment_ids=SEGMENTS),
    )
    exact = [x.astype(jnp.float32) for x in (*halves, direction)]
    wanted = value_and_gradients(
        written_out, exact, CAUSAL, MaskInputs(segment_ids=SEGMENTS)
    )
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(
            a.astype(np.float32), b, rtol=2e-2, atol=2e-2 * scale
        )


def test_vmap_equals_a_loop_and_second_derivatives_exist():
    query, key, value, _ = arrays()
    stacked = [jnp.stack([x, 2 * x]) for x in (query, key, value)]

    def loss(*xs):
        return jnp.square(blockwise_attention(*xs, CAUSAL, MaskInputs())).sum()

    gradient = jax.jit(jax.grad(loss))
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(*stacked)
    for i in range(2):
        alone = gradient(*(x[i] for x in stacked))
        np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-5)
    square = jax.grad(lambda *xs: jnp.square(jax.grad(loss)(*xs)).sum())
    second = jax.jit(square)(query, key, value)
    assert np.isfinite(second).all()
    assert np.any(second)


def test_a_bias_is_added_to_the_scores_and_has_gradients():
    query, key, value, weights = arrays()
    bias = jax.random.normal(jax.random.key(1), (1, 4, T, T))

    def full(query, key, value, bias):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * 6**-0.5 + bias
        scores = jnp.where(PADDED[:, None, None], scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)

    def ours(query, key, value, bias):
        return bidirectional_attention(query, key, value, PADDED, bias=bias)

    def results(attend):
        loss = jax.value_and_grad(
            lambda *xs: jnp.sum(weights * attend(*xs)), argnums=(0, 1, 2, 3)
        )
        return jax.jit(loss)(query, key, value, bias)

    for got, want in zip(
        *map(jax.tree.leaves, (results(ours), results(full))), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"window must be None .* a bias; got 3"):
        bidirectional_attention(query, key, value, bias=bias, window=3)


def test_padding_queries_do_not_affect_real_tokens():
    query, key, value, _ = arrays()
    attend = jax.jit(bidirectional_attention)
    out = attend(query, key, value, PADDED)
    junk = jnp.where(PADDED[..., None, None], 0.0, 1e3)
    other = attend(query + junk, key + junk, value + junk, PADDED)
    np.testing.assert_array_equal(out[PADDED], other[PADDED])
