"""A model of LoRA layers merges into the plain tree of its Linen counterpart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    LoRAAttention,
    LoRAConfig,
    LoRAConv,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAEmbed,
    adapt,
    lora_layer_targets,
    merge_lora_layers,
)
from tests.nn.tools import equal, key, tuned
from tests.reference import assert_close

IDS = jnp.arange(10).reshape(2, 5)
CONFIG = LoRAConfig(
    rank=3,
    alpha=7.0,
    targets=["words", "query", "out", "up", "mix", "window", "gate"],
    rank_pattern={"up": 2},
    alpha_pattern={"words": 1.0},
    train=["head"],
)


def model_of(config: LoRAConfig | None):
    """Returns a model of LoRA layers, or of Linen's, with the same parameters."""

    def make(lora_cls, linen, *args, **kwargs):
        return (
            linen(*args, **kwargs)
            if config is None
            else lora_cls(*args, **kwargs, lora=config)
        )

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = make(
                *(LoRAAttention, nn.MultiHeadDotProductAttention),
                num_heads=2,
                name="attention",
            )
            x = x + attention(x, x)
            gate = make(LoRADenseGeneral, nn.DenseGeneral, (2, 4), name="gate")(x)
            up = make(LoRADense, nn.Dense, 8, name="up")(x)
            return x + jnp.tanh(up) * gate.reshape(x.shape), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            words = make(LoRAEmbed, nn.Embed, 11, 8, name="words")
            x = words(ids)
            layers = nn.scan(
                Layer,
                # The layer axis of A and B is another than that of W0.
                variable_axes={"params": 0, "frozen": 0, "lora": 1},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = layers(name="layers")(x)
            x = make(LoRAConv, nn.Conv, 8, (3,), name="window")(x)
            x = make(*(LoRAEinsum, nn.Einsum), (8, 8), "bti,io->bto", name="mix")(x)
            return nn.Dense(3, name="head")(x) + words.attend(x)[..., :3]

    return Model()


def variables_of(config):
    return tuned(jax.jit(model_of(config).init)(key(0), IDS))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_merged_tree_fits_the_plain_model(dora):
    config = LoRAConfig(**{**CONFIG.to_dict(), "dora": dora})
    if dora:  # on a table that heads the model too, DoRA scales what attend is given
        config = LoRAConfig(**{**config.to_dict(), "targets": ["query", "out", "up"]})
        config = LoRAConfig(**{**config.to_dict(), "alpha_pattern": {}})
    model, variables = model_of(config), variables_of(config)
    kept = jax.tree.map(np.array, variables)
    params = merge_lora_layers(model, variables, IDS)
    wanted = jax.eval_shape(model_of(None).init, key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    plain = jax.jit(model_of(None).apply)({"params": params}, IDS)
    assert_close(plain, jax.jit(model.apply)(variables, IDS))
    untrained = {**variables["frozen"], **variables["params"]}
    base = jax.jit(model_of(None).apply)({"params": untrained}, IDS)
    assert not np.allclose(plain, base, rtol=1e-2)
    assert equal(variables, kept)


def test_the_targets_match_adapt_and_need_no_example():
    variables = variables_of(CONFIG)
    found = lora_layer_targets(model_of(CONFIG), variables)
    assert {(t.path, t.rank, t.alpha) for t in found} == {
        ("words", 3, 1.0),
        ("layers/attention/query", 3, 7.0),
        ("layers/attention/out", 3, 7.0),
        ("layers/gate", 3, 7.0),
        ("layers/up", 2, 7.0),
        ("window", 3, 7.0),
        ("mix", 3, 7.0),
    }
    rows = adapt(model_of(None), CONFIG, IDS).targets()
    assert {t.path: (t.kernel_shape, t.trainable) for t in rows} == {
        t.path: (t.kernel_shape, t.trainable) for t in found
    }
    up = next(t for t in found if t.path == "layers/up")
    assert up.leaf_shapes == {"lora_a": (8, 3, 2), "lora_b": (2, 3, 8)}


def test_a_plain_model_or_another_models_adapter_is_rejected():
    model = nn.Dense(4)
    variables = model.init(key(0), jnp.ones((1, 3)))
    with pytest.raises(
        ValueError, match=r"Dense must contain LoRA layers .* 0 LoRA lay"
    ):
        merge_lora_layers(model, variables)
    none = LoRADense(4, lora=LoRAConfig(targets=["other"]))
    with pytest.raises(ValueError, match=r"1 LoRA layers were found, 0 adapted"):
        merge_lora_layers(none, none.init(key(0), jnp.ones((1, 3))))
    layer = LoRADense(4, lora=LoRAConfig(rank=2, alpha=3, targets=".*"))
    given = layer.init(key(0), jnp.ones((1, 3)))
    wide = {**given, "lora": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 4))}}
    with pytest.raises(ValueError, match=r"lora_a .*\(3, 2\)"):
        merge_lora_layers(layer, wide)
    with pytest.raises(ValueError, match="LoRADense needs example inputs"):
        merge_lora_layers(layer, {**given, "frozen": {"kernel": jnp.ones((3, 5))}})
