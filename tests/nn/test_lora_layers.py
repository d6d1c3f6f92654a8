"""The LoRA layers: their variables, agreement with Linen, options."""

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
    find_targets,
)
from tests.nn.tools import equal, key, normal, shapes, tuned
from tests.reference import assert_close

ALL = LoRAConfig(rank=3, alpha=7.0, targets=".*")
NONE = LoRAConfig(rank=3, targets=["elsewhere"])
IDS = jnp.asarray([[1, 4, 0], [2, 2, 6]])
X = normal((3, 4, 8))

LORA_LAYERS = {
    "dense": (LoRADense, nn.Dense, (6,), {}, X),
    "heads": (LoRADenseGeneral, nn.DenseGeneral, ((3, 2),), {}, X),
    "two_axes": (LoRADenseGeneral, nn.DenseGeneral, (5,), {"axis": (-2, -1)}, X),
    "batch_dims": (LoRADenseGeneral, nn.DenseGeneral, (5,), {"batch_dims": 0}, X),
    "experts": (LoRAEinsum, nn.Einsum, ((3, 8, 5), "ebi,eio->ebo"), {}, X),
    "conv": (LoRAConv, nn.Conv, (6, (3,)), {"strides": 2, "padding": "CAUSAL"}, X),
    "circular": (
        *(LoRAConv, nn.Conv, (6, (2,))),
        {"padding": "CIRCULAR", "kernel_dilation": 2, "feature_group_count": 2},
        X,
    ),
    "embed": (LoRAEmbed, nn.Embed, (7, 5), {}, IDS),
}


@pytest.mark.parametrize("name", LORA_LAYERS)
def test_a_lora_layer_loads_linen_parameters_and_is_bitwise_equal(name):
    lora_cls, linen, args, options, x = LORA_LAYERS[name]
    plain = linen(*args, **options)
    layer = lora_cls(*args, **options, lora=ALL)
    variables = jax.jit(layer.init)(key(0), x)
    params = jax.jit(plain.init)(key(0), x)["params"]
    assert equal(variables["frozen"], params)
    assert set(variables) == {"frozen", "lora"}
    params = tuned(params)

    @jax.jit
    def both(params):
        mine = {"frozen": params, "lora": variables["lora"]}
        return plain.apply({"params": params}, x), layer.apply(mine, x)

    assert equal(*both(params))
    untargeted = lora_cls(*args, **options, lora=NONE)
    assert set(jax.eval_shape(untargeted.init, key(0), x)) == {"frozen"}
    assert equal(jax.jit(untargeted.apply)({"frozen": params}, x), both(params)[0])


class Model(nn.Module):
    """A small model of every LoRA layer, with one config."""

    lora: LoRAConfig

    @nn.compact
    def __call__(self, ids, deterministic=True):
        embed = LoRAEmbed(7, 8, lora=self.lora, name="embed")
        x = embed(ids)
        x = x + LoRAConv(8, (3,), lora=self.lora, name="conv")(x, deterministic)
        for i in range(2):
            x = Mlp(self.lora, name=f"layer_{i}")(x, deterministic)
        return embed.attend(x, deterministic)


class Mlp(nn.Module):
    lora: LoRAConfig

    @nn.compact
    def __call__(self, x, deterministic):
        h = LoRADense(12, lora=self.lora, name="up")(x, deterministic)
        return x + LoRADense(8, lora=self.lora, name="down")(nn.relu(h), deterministic)


def variables_of(config):
    return jax.eval_shape(Model(config).init, key(0), IDS)


def leaves_of(tree):
    return {
        "/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(tree)
    }


def test_all_linear_excludes_embeddings_and_convolutions():
    variables = variables_of(LoRAConfig(rank=2))
    assert shapes(variables["lora"]) == {
        f"layer_{i}": {
            "up": {"lora_a": (8, 2), "lora_b": (2, 12)},
            "down": {"lora_a": (12, 2), "lora_b": (2, 8)},
        }
        for i in range(2)
    }
    assert set(variables["frozen"]) == {"embed", "conv", "layer_0", "layer_1"}


def test_one_config_with_patterns_drives_a_whole_model():
    config = LoRAConfig(
        rank=2,
        targets=["embed", "conv", "up", "down"],
        exclude=["layer_1/down"],
        rank_pattern={"layer_0/.*": 3, "embed": 1},
    )
    assert shapes(variables_of(config)["lora"]) == {
        "embed": {"lora_a": (7, 1), "lora_b": (1, 8)},
        "conv": {"lora_a": (3, 8, 2), "lora_b": (2, 8)},
        "layer_0": {
            "up": {"lora_a": (8, 3), "lora_b": (3, 12)},
            "down": {"lora_a": (12, 3), "lora_b": (3, 8)},
        },
        "layer_1": {"up": {"lora_a": (8, 2), "lora_b": (2, 12)}},
    }
    second = LoRAConfig(rank=2, layers=[1])
    assert set(variables_of(second)["lora"]) == {"layer_1"}


def test_alpha_pattern_and_rslora_set_the_scaling_of_a_layer():
    x, layer = normal((2, 8)), LoRADense(4, lora=ALL)
    variables = tuned(jax.jit(layer.init)(key(0), x))
    variables["frozen"]["kernel"] = jnp.zeros((8, 4))  # the output is only the update
    variables["frozen"]["bias"] = jnp.zeros(4)

    def change(**options):
        config = LoRAConfig(rank=3, targets=".*", **options)
        return layer.clone(lora=config).apply(variables, x)

    once = change(alpha=3.0)  # scaling 1
    assert_close(change(alpha=3.0, alpha_pattern={".*": 6.0}), 2 * once)
    assert_close(change(alpha=3.0, rslora=True), 3**0.5 * once)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (
            {"train": ["layer_1"]},
            {f"layer_1/{n}/{w}" for n in ("up", "down") for w in ("kernel", "bias")},
        ),
        ({"train": ["conv/bias"]}, {"conv/bias"}),
        (
            {"targets": ["up"], "bias": "lora_only"},
            {"layer_0/up/bias", "layer_1/up/bias"},
        ),
        (
            {"targets": ["up"], "bias": "all"},
            {"conv/bias"}
            | {f"layer_{i}/{n}/bias" for i in (0, 1) for n in ("up", "down")},
        ),
    ],
    ids=["module", "leaf", "lora_only", "all"],
)
def test_base_weights_trained_in_full_live_in_params(options, trained):
    variables = variables_of(LoRAConfig(rank=2, **options))
    assert leaves_of(variables["params"]) == trained
    assert not leaves_of(variables["frozen"]) & trained
    assert not any(path in trained for path in leaves_of(variables["lora"]))


def test_adding_a_target_changes_no_other_adapter():
    """Law 15, for modules: each draws from the stream of its own path."""
    few, more = (
        jax.jit(Model(LoRAConfig(rank=2, targets=t)).init)(key(0), IDS)
        for t in (["up"], ["embed", "up", "down"])
    )
    assert equal(few["frozen"], more["frozen"])
    for layer in ("layer_0", "layer_1"):
        assert equal(few["lora"][layer]["up"], more["lora"][layer]["up"])
    first, second = (more["lora"][layer]["up"] for layer in ("layer_0", "layer_1"))
    assert not np.allclose(first["lora_a"], second["lora_a"])


# --- Dropout


@pytest.mark.parametrize("is_lora_layer", [True, False], ids=["LoRA layer", "adapted"])
def test_integers_are_accepted_as_in_linen(is_lora_layer):
    x = jnp.arange(24).reshape(3, 8)
    layer = LoRADense(6, lora=ALL) if is_lora_layer else adapt(nn.Dense(6), ALL, x)
    variables = tuned(jax.jit(layer.init)(key(0), x))
    got = layer.apply(variables, x)
    assert np.array_equal(got, layer.apply(variables, x.astype("float32")))


DROPPING = LoRAConfig(rank=3, alpha=7.0, targets=".*", dropout_rate=0.5)


def test_the_deterministic_switch():
    x = normal((2, 8))
    layer = LoRADense(4, lora=DROPPING)
    variables = tuned(jax.jit(layer.clone(deterministic=True).init)(key(0), x))
    plain = LoRADense(4, lora=ALL).apply(variables, x)
    off = layer.clone(deterministic=True)
    assert np.array_equal(layer.apply(variables, x, True), plain)  # no key needed
    assert np.array_equal(off.apply(variables, x), plain)
    on = layer.apply(variables, x, deterministic=False, rngs={"dropout": key(1)})
    assert not np.allclose(on, plain)
    with pytest.raises(
        ValueError, match=r"rngs must have 'dropout' for dropout_rate=0.5"
    ):
        layer.apply(variables, x, deterministic=False)
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, x)
    with pytest.raises(ValueError, match="deterministic"):
        off.apply(variables, x, deterministic=False)
    untargeted = layer.clone(lora=LoRAConfig(targets=["no"], dropout_rate=0.5))
    untargeted.apply({"frozen": variables["frozen"]}, x)  # nothing to drop


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_a_lookup_has_no_dropout(deterministic):
    layer = LoRAEmbed(7, 4, deterministic=deterministic, lora=DROPPING)
    variables = tuned(jax.jit(layer.init)(key(0), IDS))
    plain = LoRAEmbed(7, 4, lora=ALL).apply(variables, IDS)
    assert np.array_equal(layer.apply(variables, IDS), plain)  # no key needed


@pytest.mark.parametrize("is_lora_layer", [True, False], ids=["LoRA layer", "adapted"])
def test_a_tied_head_applies_dropout_to_its_query(is_lora_layer):
    query, table = normal((2, 4)), nn.Embed(7, 4)

    def attend(rate, *, off=False):
        config = LoRAConfig(rank=3, alpha=7.0, targets=".*", dropout_rate=rate)
        layer = (
            LoRAEmbed(7, 4, deterministic=off, lora=config)
            if is_lora_layer
            else adapt(table, config, IDS, deterministic=off)
        )
        variables = tuned(jax.jit(layer.init)(key(0), IDS))
        rngs = {} if off else {"dropout": key(1)}
        base = table.apply({"params": variables["frozen"]}, query, method="attend")
        return layer.apply(variables, query, method="attend", rngs=rngs), base

    plain, base = attend(0.0)
    assert not np.allclose(plain, base)
    assert np.array_equal(attend(1.0)[0], base)
    assert not np.allclose(attend(0.5)[0], plain)
    assert np.array_equal(attend(0.5, off=True)[0], plain)


def test_masks_differ_between_tokens_and_layers():
    x = jnp.ones((1, 6, 8))

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = (
                LoRADense(8, deterministic=False, lora=DROPPING, name=name)
                for name in ("first", "second")
            )
            return first(x), second(x)

    one = {
        "frozen": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)},
        "lora": {"lora_a": normal((8, 3)), "lora_b": normal((3, 8), seed=1)},
    }
    variables = {c: {"first": one[c], "second": one[c]} for c in one}
    first, second = Twice().apply(variables, x, rngs={"dropout": key(1)})
    assert len(np.unique(np.asarray(first)[0], axis=0)) == 6
    assert not np.allclose(first, second)


# --- Bad input


def test_invalid_variables_are_named():
    layer = LoRADense(6, lora=ALL)
    variables = layer.init(key(0), X)
    frozen, lora = variables["frozen"], variables["lora"]

    def apply(layer=layer, **variables):
        return jax.eval_shape(layer.apply, variables, X)

    with pytest.raises(ValueError, match=r"\['frozen'\] must have 'kernel'; got none"):
        apply(params=frozen, lora=lora)
    with pytest.raises(ValueError, match=r"\['lora'\] must have 'lora_a'; got none"):
        apply(frozen=frozen)
    with pytest.raises(ValueError, match=r"\['lora'\] has 'lora_a', but .* not target"):
        apply(layer.clone(lora=NONE), frozen=frozen, lora=lora)
    with pytest.raises(ValueError, match=r"kernel must be \(8, 6\); got \(8, 5\)"):
        apply(frozen={**frozen, "kernel": frozen["kernel"][:, 1:]}, lora=lora)
    narrow = {"lora_a": lora["lora_a"][:, 1:], "lora_b": lora["lora_b"][1:]}
    wanted = r"be \(8, 3\), \(3, 6\) for rank 3 .* got \(8, 2\), \(2, 6\)"
    with pytest.raises(ValueError, match=wanted):
        apply(frozen=frozen, lora=narrow)


def test_errors_show_paths_in_the_whole_model():
    variables = Model(LoRAConfig(rank=2)).init(key(0), IDS)
    del variables["lora"]["layer_1"]["down"]
    with pytest.raises(ValueError, match=r"\['lora'\] must have 'layer_1/down/lora_a'"):
        Model(LoRAConfig(rank=2)).apply(variables, IDS)


@pytest.mark.parametrize(
    "make",
    [
        lambda lora: LoRADense(4, lora=lora),
        lambda lora: LoRAEmbed(4, 4, lora=lora),
        lambda lora: LoRAAttention(2, lora=lora),
    ],
    ids=["dense", "embed", "attention"],
)
def test_a_config_of_the_wrong_type_is_rejected_immediately(make, unchecked):
    with pytest.raises(
        TypeError, match=r"lora must be a LoRAConfig; got (FrozenDict|dict)"
    ):
        make({"rank": 2})
    with pytest.raises(TypeError, match=r"lora must be a LoRAConfig; got NoneType"):
        make(None)


def test_integer_inputs_of_attention_are_rejected(unchecked):
    layer = LoRAAttention(2, lora=ALL)
    with pytest.raises(TypeError, match=r"inputs_k, inputs_v must be floating-point"):
        jax.eval_shape(layer.init, key(0), jnp.ones((1, 2, 8), jnp.int32))


def test_a_rank_above_the_smaller_side_is_a_warning():
    layer = LoRADense(2, lora=ALL)
    with pytest.warns(UserWarning, match=r"rank 3 exceeds .* \(8 inputs, 2 outputs\)"):
        jax.eval_shape(layer.init, key(0), X)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: adapt(model, ALL, IDS).init(key(0), IDS),
        lambda model: find_targets(model, ALL, IDS),
    ],
    ids=["init", "find_targets"],
)
def test_adapting_a_model_that_has_lora_layers_is_an_error(call):
    with pytest.raises(ValueError, match="already has LoRA layers, such as 'embed'"):
        call(Model(LoRAConfig(rank=2)))
