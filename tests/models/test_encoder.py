"""The encoder against what transformers computes with the same weights."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop.pretrained import load_model
from lora_jax.models.activations import exact_gelu
from lora_jax.models.encoder import SequenceClassifier
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.pooling import mean_pool

GOLDEN = Path(__file__).parents[1] / "golden" / "bert"
TINY = EncoderConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=1,
    num_heads=2,
    mlp_size=5,
    max_positions=7,
)


@pytest.fixture(scope="module")
def loaded():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "reference.npz", allow_pickle=False))


def run(loaded, golden, activation, *, types=True, dtype=jnp.float32, hidden=False):
    config = dataclasses.replace(loaded.config, activation=activation)
    module = loaded.module.clone(config=config, dtype=dtype)
    ids, mask, segments = (
        jnp.asarray(golden[name], jnp.int32)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    method = (lambda m, *args: m.encoder(*args)) if hidden else None
    apply = jax.jit(functools.partial(module.apply, method=method))
    return apply({"params": loaded.params}, ids, mask, segments if types else None)


def test_the_golden_file_says_which_versions_made_it(golden):
    metadata = json.loads(str(golden["metadata"]))
    assert metadata["script"] == "tests/golden/make_bert.py"
    assert {"torch", "transformers"} <= metadata.keys()


@pytest.mark.parametrize("types", [True, False], ids=["types", "no_types"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_hidden_states_and_logits_equal_those_of_transformers(
    loaded, golden, activation, types
):
    suffix = activation if types else f"{activation}_no_types"
    hidden = run(loaded, golden, activation, types=types, hidden=True)
    real = golden["attention_mask"].astype(bool)
    want = golden[f"hidden_{suffix}"]
    np.testing.assert_allclose(hidden[real], want[real], rtol=1e-5, atol=2e-5)
    logits = run(loaded, golden, activation, types=types)
    np.testing.assert_allclose(logits, golden[f"logits_{suffix}"], rtol=1e-5, atol=2e-5)


def test_the_golden_activations_can_be_told_apart(golden):
    # else the test above could not see a wrong one
    exact, tanh = golden["hidden_gelu"], golden["hidden_gelu_new"]
    assert np.abs(exact - tanh).max() > 5e-5


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(loaded, golden):
    hidden = run(loaded, golden, "gelu", dtype=jnp.bfloat16, hidden=True)
    logits = run(loaded, golden, "gelu", dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    real = golden["attention_mask"].astype(bool)
    want = golden["hidden_gelu"][real]
    error = np.abs(np.asarray(hidden, np.float32)[real] - want)
    assert error.mean() < 2e-2 * np.abs(want).mean()


def test_padding_changes_nothing(loaded, golden):
    ids, mask = (
        jnp.asarray(golden[name][1:2], jnp.int32)
        for name in ("input_ids", "attention_mask")
    )
    length = int(mask.sum())
    variables = {"params": loaded.params}
    embed = jax.jit(functools.partial(loaded.module.apply, method="embed"))
    padded = embed(variables, ids, mask)
    other = embed(variables, jnp.where(mask, ids, 3), mask)
    short = embed(variables, ids[:, :length], mask[:, :length])
    assert (padded == other).all()
    np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)


def test_exact_gelu_is_x_times_the_normal_distribution():
    x = jnp.linspace(-6, 6, 101)
    want = np.asarray(x, np.float64) * jax.scipy.stats.norm.cdf(x)
    np.testing.assert_allclose(exact_gelu(x), want, rtol=1e-5, atol=1e-6)


def test_mean_pool_averages_unmasked_tokens_and_is_zero_for_none():
    hidden = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[1, 0, 1], [0, 0, 0]])
    assert mean_pool(hidden, mask).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_the_parameter_tree_is_the_one_of_the_docstring():
    module = SequenceClassifier(TINY, num_labels=3)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = module.init(jax.random.key(0), ids, ids)["params"]
    dense = {"kernel": (6, 6), "bias": (6,)}
    norm = {"scale": (6,), "bias": (6,)}
    assert jax.tree.map(jnp.shape, params) == {
        "encoder": {
            "embeddings": {
                "word": {"embedding": (11, 6)},
                "position": {"embedding": (7, 6)},
                "token_type": {"embedding": (2, 6)},
                "norm": norm,
            },
            "layer_0": {
                "attention": dict.fromkeys(("query", "key", "value", "output"), dense),
                "attention_norm": norm,
                "mlp": {
                    "up": {"kernel": (6, 5), "bias": (5,)},
                    "down": {"kernel": (5, 6), "bias": (6,)},
                },
                "mlp_norm": norm,
            },
        },
        "classifier": {"kernel": (6, 3), "bias": (3,)},
    }


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_without_labels_the_call_returns_the_pooled_vector(pooling):
    module = SequenceClassifier(TINY, pooling=pooling)
    ids, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), jnp.int32)
    pooled, variables = module.init_with_output(jax.random.key(0), ids, mask)
    assert pooled.shape == (2, 6)
    assert "classifier" not in variables["params"]
    assert ("pooler" in variables["params"]) == (pooling == "pooler")


def test_dropout_acts_only_when_not_deterministic():
    module = SequenceClassifier(TINY, dropout_rate=0.5)
    ids = jnp.ones((2, 3), jnp.int32)
    variables = module.init(jax.random.key(0), ids, ids)
    plain = module.apply(variables, ids, ids)
    dropped = module.apply(
        variables,
        ids,
        ids,
        deterministic=False,
        rngs={"dropout": jax.random.key(1)},
    )
    assert (plain == module.clone(dropout_rate=0.0).apply(variables, ids, ids)).all()
    assert not jnp.allclose(plain, dropped)


def test_tables_that_are_not_differentiated_have_no_scatter():
    module = SequenceClassifier(TINY, num_labels=2)
    ids = jnp.ones((2, 3), jnp.int32)
    params = module.init(jax.random.key(0), ids, ids)["params"]

    def loss(head, encoder):
        variables = {"params": {"encoder": encoder, "classifier": head}}
        return module.apply(variables, ids, ids).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params["classifier"], params["encoder"]))
    assert "scatter" not in text
    both = jax.make_jaxpr(jax.grad(loss, argnums=1))(
        params["classifier"], params["encoder"]
    )
    assert "scatter" in str(both)  # the test can see one


@pytest.mark.usefixtures("unchecked")
def test_inputs_of_a_wrong_kind_are_named():
    module = SequenceClassifier(TINY)
    ids = jnp.ones((2, 3), jnp.int32)
    variables = module.init(jax.random.key(0), ids, ids)
    with pytest.raises(TypeError, match=r"input_ids must be integers.*float32"):
        module.apply(variables, ids.astype(jnp.float32), ids)
    with pytest.raises(ValueError, match=r"\(2, 3\), attention_mask \(2, 2\)"):
        module.apply(variables, ids, ids[:, :2])
    with pytest.raises(ValueError, match=r"token_type_ids \(1, 3\)"):
        module.apply(variables, ids, ids, ids[:1])
    with pytest.raises(ValueError, match=r"batch dimension"):
        module.apply(variables, ids[0], ids[0])
    long = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"max_positions = 7 .*\(1, 8\)"):
        module.apply(variables, long, long)


def test_config_names_every_fault_at_once():
    with pytest.raises(ValueError, match=r"vocab_size .* 0; .*'swish!'; norm_eps .*-1"):
        dataclasses.replace(TINY, vocab_size=0, activation="swish!", norm_eps=-1.0)
    with pytest.raises(ValueError, match=r"divide hidden_size = 6; got 4"):
        dataclasses.replace(TINY, num_heads=4)


def test_classifier_refuses_unknown_pooling_and_no_classes():
    with pytest.raises(ValueError, match=r"mean.*cls.*pooler.*got 'max'"):
        SequenceClassifier(TINY, pooling="max")
    with pytest.raises(ValueError, match=r"num_labels must be at least 1.*got 0"):
        SequenceClassifier(TINY, num_labels=0)
