"""LoRAAttention against Linen's own attention, a NumPy reference, and the laws."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAAttention, LoRAConfig
from tests.nn.tools import (
    equal,
    initialised,
    key,
    merged_attention,
    normal,
    shapes,
    tuned,
    variables_of,
)
from tests.reference import assert_close

CONFIG = LoRAConfig(rank=3, alpha=7.0)
X = normal((2, 5, 12))
MEMORY = normal((2, 7, 10), seed=1)
CAUSAL = nn.make_causal_mask(jnp.ones((2, 5)))
PADDING = jnp.asarray([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])[:, None, None]
BIASES = {"bias_init": nn.initializers.normal(0.5)}
PROJECTIONS = ("query", "key", "value", "out")


# --- Against flax.linen.MultiHeadDotProductAttention


@pytest.mark.parametrize(
    ("inputs", "options", "call"),
    [
        pytest.param((X,), {}, {}, id="self"),
        pytest.param((X,), {"use_bias": False}, {"mask": CAUSAL}, id="causal"),
        pytest.param((X, MEMORY), {}, {"mask": PADDING}, id="cross_padding"),
        pytest.param((X, MEMORY, 2 * MEMORY), {}, {}, id="three_inputs"),
        pytest.param(
            (X,), {"normalize_qk": True, "qkv_features": 24}, {}, id="normalize_qk"
        ),
        pytest.param(
            (normal((2, 3, 4, 12)),), {"out_features": 5}, {}, id="two_batch_dims"
        ),
    ],
)
def test_linen_attention_params_load_unchanged_and_agree(inputs, options, call):
    linen = nn.MultiHeadDotProductAttention(num_heads=4, **BIASES, **options)
    ours = LoRAAttention(num_heads=4, lora=CONFIG, **BIASES, **options)
    fresh = initialised(ours, *(x.shape for x in inputs))
    params = jax.eval_shape(linen.init, key(1), *inputs)["params"]
    assert shapes(params) == shapes(fresh["frozen"])
    assert set(fresh["lora"]) == set(PROJECTIONS)

    apply = jax.jit(lambda v: ours.apply(v, *inputs, **call))
    plain = jax.jit(
        lambda v: linen.apply({"params": merged_attention(v)}, *inputs, **call)
    )
    got, wanted = apply(fresh), plain(fresh)  # B = 0: the merged kernels are the base's
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    variables = tuned(fresh)
    changed = apply(variables)
    assert_close(changed, plain(variables))
    assert not np.allclose(
        changed, apply({**variables, "lora": fresh["lora"]}), atol=1e-2
    )


def test_initial_values_match_linen_for_the_same_key():
    linen, ours = (
        initialised(layer(num_heads=4), X.shape)
        for layer in (nn.MultiHeadDotProductAttention, LoRAAttention)
    )
    assert equal(ours["frozen"], linen["params"])


def test_a_bfloat16_base_is_preserved_and_agrees():
    x = X.astype(jnp.bfloat16)
    linen = nn.MultiHeadDotProductAttention(num_heads=4, force_fp32_for_softmax=True)
    ours = LoRAAttention(num_heads=4, lora=CONFIG)
    variables = variables_of(ours, X)
    variables["frozen"] = jax.tree.map(
        lambda w: w.astype(jnp.bfloat16), variables["frozen"]
    )
    got = jax.jit(ours.apply)(variables, x)
    assert got.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {
        np.dtype("float32")
    }
    plain = jax.jit(lambda v: linen.apply({"params": merged_attention(v)}, x))
    assert_close(got, plain(variables), "bfloat16")
    grads = jax.grad(lambda a: ours.apply({**variables, "lora": a}, x).sum())
    dtypes = jax.eval_shape(grads, variables["lora"])
    assert {leaf.dtype for leaf in jax.tree.leaves(dtypes)} == {np.dtype("float32")}


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_dropout_matches_linen(broadcast):
    options = {
        "num_heads": 4,
        "dropout_rate": 0.4,
        "broadcast_dropout": broadcast,
        "deterministic": False,
    }
    linen = nn.MultiHeadDotProductAttention(**options)
    ours = LoRAAttention(**options, lora=CONFIG)
    variables = variables_of(LoRAAttention(4, lora=CONFIG), X)
    rngs = {"dropout": key(3)}
    plain = jax.jit(
        lambda v: linen.apply({"params": merged_attention(v)}, X, rngs=rngs)
    )
    got = jax.jit(functools.partial(ours.apply, rngs=rngs))(variables, X)
    assert_close(got, plain(variables))
    off = jax.jit(ours.clone(deterministic=True).apply)
    assert not np.allclose(got, off(variables, X))


def test_a_dropout_key_may_be_given_at_the_call():
    layer = LoRAAttention(4, dropout_rate=0.4, lora=CONFIG)
    variables = variables_of(LoRAAttention(4, lora=CONFIG), X)

    @jax.jit
    def apply(key):
        return layer.apply(variables, X, deterministic=False, dropout_rng=key)

    assert np.array_equal(apply(key(0)), apply(key(0)))
    assert not np.allclose(apply(key(0)), apply(key(1)))


def test_sowing_weights_and_precision_change_no_values():
    layer = LoRAAttention(4, num_kv_heads=2, is_causal=True, lora=CONFIG)
    variables = variables_of(layer, X)
    wanted = jax.jit(layer.apply)(variables, X)
    sow = functools.partial(layer.apply, sow_weights=True, mutable="intermediates")
    got, sown = jax.jit(sow)(variables, X)
    (weights,) = sown["intermediates"]["attention_weights"]
    assert_close(got, wanted)
    assert_close(weights.sum(-1), np.ones((2, 4, 5)))
    assert not np.triu(weights, 1).any()
    exact = layer.clone(precision="highest")
    assert_close(jax.jit(exact.apply)(variables, X), wanted)


# --- Against NumPy


def softmax_attention(params, x, memory, *, bias=0.0, mask=True):
    """Attention in float64, head by head; query head j uses key head j // group."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

    def project(name, x):
        kernel = params[name]["kernel"]
        return np.einsum("btd,dnh->bnth", x, kernel) + params[name]["bias"][:, None]

    q, k, v = (
        project(name, np.asarray(inputs, np.float64))
        for name, inputs in (("query", x), ("key", memory), ("value", memory))
    )
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    logits = np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
    logits += np.asarray(bias)
    logits = np.where(mask, logits, -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnts,bnsh->btnh", weights, v)
    return (
        np.einsum("btnh,nhd->btd", y, params["out"]["kernel"]) + params["out"]["bias"]
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_queries_match_softmax_attention(kv_heads):
    layer = LoRAAttention(
        *(6, kv_heads, 24), is_causal=True, out_features=8, lora=CONFIG
    )
    variables = variables_of(layer, X)
    bias = normal((2, 6, 5, 5), seed=2)
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]])[:, None, None] > 0
    got = jax.jit(functools.partial(layer.apply, bias=bias, mask=mask))(variables, X)
    causal = np.tri(5, dtype=bool)
    wanted = softmax_attention(
        jax.jit(merged_attention)(variables), X, X, bias=bias, mask=mask & causal
    )
    assert_close(got, wanted)


def test_grouped_cross_attention_matches_softmax_attention():
    layer = LoRAAttention(6, 2, lora=CONFIG)
    variables = variables_of(layer, X, MEMORY)
    got = jax.jit(functools.partial(layer.apply, mask=PADDING))(variables, X, MEMORY)
    wanted = softmax_attention(
        jax.jit(merged_attention)(variables), X, MEMORY, mask=PADDING > 0
    )
    assert_close(got, wanted)


# --- The decode cache


def test_the_decode_cache_is_bitwise_equal_to_linens():
    options = {"num_heads": 4, "decode": True}
    linen = nn.MultiHeadDotProductAttention(**options)
    ours = LoRAAttention(**options, lora=CONFIG)
    theirs, mine = initialised(linen, X.shape), initialised(ours, X.shape)
    assert equal(theirs["cache"], mine["cache"])
    step = functools.partial(jax.jit, static_argnums=0)(
        lambda layer, variables, x: layer.apply(variables, x, mutable="cache")
    )
    for t in range(3):
        wanted, update = step(linen, theirs, X[:, t : t + 1])
        theirs = {**theirs, **update}
        got, update = step(ours, mine, X[:, t : t + 1])
        mine = {**mine, **update}
        assert equal(theirs["cache"], mine["cache"])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_decoding_step_by_step_is_one_causal_pass():
    layer = LoRAAttention(6, num_kv_heads=2, is_causal=True, lora=CONFIG)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])[:, None, None]
    variables = variables_of(layer, X)
    wanted = jax.jit(functools.partial(layer.apply, mask=mask))(variables, X)
    decoder = layer.clone(decode=True)
    step = jax.jit(functools.partial(decoder.apply, mutable="cache", mask=mask))
    cache = initialised(decoder, X.shape)["cache"]
    assert shapes(cache["cached_key"]) == (2, 5, 2, 2)
    got = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):  # a prompt, then one by one
        y, update = step({**variables, "cache": cache}, X[:, start:stop])
        cache = update["cache"]
        got.append(y)
    assert int(cache["cache_index"]) == 5
    assert_close(jnp.concatenate(got, axis=1)[:, 1:], wanted[:, 1:])
    assert step._cache_size() == 2  # one for each number of new positions


def test_an_incompatible_cache_is_an_error():
    decoder = LoRAAttention(4, decode=True, lora=CONFIG)
    variables = initialised(decoder, (2, 5, 12))
    decode = functools.partial(decoder.apply, variables, mutable="cache")
    with pytest.raises(ValueError, match=r"at most 5 new positions.* \(2, 6, 4, 3\)"):
        decode(normal((2, 6, 12)))
    with pytest.raises(ValueError, match=r"\*b = \[2\].* got \(3, 1, 4, 3\)"):
        decode(normal((3, 1, 12)))
    with pytest.raises(ValueError, match=r"s\] = \[2, 4, 1, 5\].* got \(2, 1, 1, 4\)"):
        decode(normal((2, 1, 12)), mask=jnp.ones((2, 1, 1, 4)))


# --- Adapters


def test_the_whole_variable_tree():
    config = LoRAConfig(
        rank=3, targets=["query", "value", "out"], rank_pattern={"value": 2}
    )
    layer = LoRAAttention(6, num_kv_heads=2, use_bias=False, lora=config)
    assert shapes(initialised(layer, X.shape)) == {
        "frozen": {
            "query": {"kernel": (12, 6, 2)},
            "key": {"kernel": (12, 2, 2)},
            "value": {"kernel": (12, 2, 2)},
            "out": {"kernel": (6, 2, 12)},
        },
        "lora": {
            "query": {"lora_a": (12, 3), "lora_b": (3, 6, 2)},
            "value": {"lora_a": (12, 2), "lora_b": (2, 2, 2)},
            "out": {"lora_a": (6, 2, 3), "lora_b": (3, 12)},
        },
    }


@pytest.mark.parametrize("name", ["key", "out"])
def test_each_projection_can_be_adapted_on_its_own(name):
    config = LoRAConfig(rank=3, alpha=7.0, targets=[name])
    layer = LoRAAttention(4, lora=config)
    variables = variables_of(layer, X)
    assert set(variables["lora"]) == {name}
    got = jax.jit(layer.apply)(variables, X)
    linen = nn.MultiHeadDotProductAttention(4)
    plain = jax.jit(lambda v: linen.apply({"params": merged_attention(v)}, X))
    assert_close(got, plain(variables))


def test_an_untargeted_attention_is_a_plain_frozen_layer():
    config = LoRAConfig(targets=["mlp"], dropout_rate=0.5)
    layer = LoRAAttention(4, deterministic=True, lora=config)
    assert set(initialised(layer, X.shape)) == {"frozen"}


def test_layer_norms_are_frozen_unless_trained():
    config = LoRAConfig(targets=["query"], train=["key_ln"])
    layer = LoRAAttention(4, normalize_qk=True, lora=config)
    variables = initialised(layer, X.shape)
    assert "query_ln" in variables["frozen"]
    assert shapes(variables["params"]) == {"key_ln": {"scale": (3,)}}


# --- Sharing x A


@pytest.mark.parametrize(
    ("inputs", "products"),
    [((X,), ["12,9"]), ((X, MEMORY), ["12,3", "10,6"])],
    ids=["self", "cross"],
)
def test_projections_with_the_same_input_share_one_product(inputs, products):
    layer = LoRAAttention(4, lora=CONFIG)
    variables = initialised(layer, *(x.shape for x in inputs))
    jaxpr = jax.make_jaxpr(layer.apply)(variables, *inputs)
    text = str(jaxpr)
    down = [line for line in text.splitlines() if "concatenate" in line]
    got = [line.split("f32[")[1].split("]")[0] for line in down]
    wide = [p for p in products if p not in ("12,3",)]
    assert got == wide  # one factor alone needs no concatenation


def test_adapter_dropout_affects_only_the_adapters():
    config = LoRAConfig(rank=3, alpha=7.0, dropout_rate=0.5)
    layer = LoRAAttention(4, lora=config)
    variables = variables_of(LoRAAttention(4, lora=CONFIG), X)
    apply = jax.jit(layer.apply, static_argnames="deterministic")
    linen = jax.jit(nn.MultiHeadDotProductAttention(4).apply)
    base = linen({"params": variables["frozen"]}, X)
    off = apply(variables, X, deterministic=True)
    assert_close(off, jax.jit(LoRAAttention(4, lora=CONFIG).apply)(variables, X))
    one, other = ({"dropout": key(i)} for i in (0, 1))
    on = apply(variables, X, deterministic=False, rngs=one)
    assert np.array_equal(on, apply(variables, X, deterministic=False, rngs=one))
    assert not np.allclose(on, off)
    assert not np.allclose(on, apply(variables, X, deterministic=False, rngs=other))
    all_dropped = layer.clone(lora=LoRAConfig(rank=3, alpha=7.0, dropout_rate=1.0))
    drop = functools.partial(all_dropped.apply, deterministic=False, rngs=one)
    got = jax.jit(drop)(variables, X)
    np.testing.assert_allclose(got, base, rtol=0, atol=1e-6)


# --- Bad input


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        (
            {"num_heads": 5},
            (X,),
            "qkv_features must be a multiple of num_heads = 5; got 12",
        ),
        (
            {"num_heads": 4, "num_kv_heads": 3},
            (X,),
            "num_heads must be a multiple of num_kv_heads = 3; got 4",
        ),
        ({"num_heads": 0}, (X,), "num_heads must be at least 1; got 0"),
        ({"dropout_rate": 1.5}, (X,), "dropout_rate must be in [0, 1); got 1.5"),
        ({}, (X, None, X), "inputs_k must be given if inputs_v is"),
        ({}, (X, MEMORY, X), "key, value must be [*b, s, k, h]"),
        ({}, (X, normal((3, 7, 10))), "with *b = [2]"),
        (
            {"is_causal": True},
            (X, MEMORY),
            "is_causal requires equal query and key",
        ),
        ({"dropout_rate": 0.5}, (X,), "deterministic"),
        (
            {"dropout_rate": 0.5, "deterministic": False},
            (X,),
            "rngs must have 'dropout' for dropout_rate=0.5; got none",
        ),
        (
            {"lora": LoRAConfig(rank=2, dropout_rate=0.5), "deterministic": False},
            (X,),
            "rngs must have 'dropout' for lora.dropout_rate=0.5; got none",
        ),
        ({"implementation": "flash"}, (X,), "'xla', 'cudnn' or None; got 'flash'"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value)[:30],
)
def test_bad_input_is_named(options, inputs, message, unchecked):
    layer = LoRAAttention(**{"num_heads": 4, "lora": LoRAConfig(rank=2), **options})
    good = LoRAAttention(4, lora=LoRAConfig(rank=2))
    fitting = [jnp.ones((2, 7, x.shape[-1])) for x in inputs[1:] if x is not None]
    variables = jax.eval_shape(good.init, key(0), X, *fitting)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        jax.eval_shape(layer.apply, variables, *inputs)
    assert message in str(error.value)


def test_integers_are_rejected():
    layer = LoRAAttention(4)
    with pytest.raises(
        TypeError, match=r"inputs_q, .* must be floating-point; .* int32"
    ):
        layer.init(key(0), jnp.ones((2, 5, 12), jnp.int32))
