"""`adapt` and `find_targets`: what is adapted, how it starts, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
import lora_jax.nnx as lnnx
from lora_jax import LoRAConfig
from lora_jax.tree.paths import flatten
from tests.nnx.models import Einsum, Experts, build, train_a_little
from tests.reference import assert_close


class Mlp(nnx.Module):
    def __init__(self, dtype=None, param_dtype=jnp.float32):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
        self.layer_0 = nnx.Linear(6, 5, **kinds)
        self.layer_1 = nnx.Linear(5, 4, **kinds)

    def __call__(self, x):
        return self.layer_1(nnx.gelu(self.layer_0(x)))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(5, name="layer_0")(x))
        return nn.Dense(4, name="layer_1")(x)


X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), jnp.float32)


def adapt(model, seed=1, **fields):
    config = LoRAConfig(**{"rank": 2, "alpha": 6, **fields})
    return lnnx.adapt(model, config, rngs=nnx.Rngs(seed))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("init", ["uniform", "gaussian"])
def test_the_same_seed_and_path_give_the_adapter_of_the_linen_side(init):
    fields = {"rank": 3, "rank_pattern": {"layer_1": 2}, "dora": True, "init": init}
    model = Mlp()
    linen = lora_jax.adapt(LinenMlp(), LoRAConfig(**fields))
    wanted = flatten(linen.attach(params_of(model), jax.random.key(1))["lora"])
    _, variables = lnnx.functional(adapt(model, **fields))
    got = flatten(variables["lora"])
    assert got.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_array_equal(got[path], wanted[path])


def test_what_was_drawn_before_or_is_adapted_besides_changes_no_adapter():
    model, rngs = Mlp(), nnx.Rngs(params=1)
    rngs.params()
    only = lnnx.adapt(model, LoRAConfig(rank=2, targets=["layer_1"]), rngs=rngs)
    both = adapt(model)
    np.testing.assert_array_equal(only.layer_1.lora_a[...], both.layer_1.lora_a[...])
    assert not hasattr(only.layer_0, "lora_a")
    assert type(only.layer_0) is nnx.Linear


def test_patterns_set_rank_and_alpha_apart():
    model = adapt(
        Mlp(), rank_pattern={"layer_0": 3}, alpha_pattern={"layer_1": 8}, rslora=True
    )
    rows = [(t.path, t.rank, t.alpha, t.scaling) for t in lnnx.lora_targets(model)]
    assert rows == [
        ("layer_0", 3, 6.0, pytest.approx(6 / 3**0.5)),
        ("layer_1", 2, 8.0, pytest.approx(8 / 2**0.5)),
    ]


def test_blocks_that_compute_alike_have_one_structure():
    """Otherwise a compiled function of one block is compiled for each of them."""
    blocks = build("gemma").layers
    config = LoRAConfig(rank=2, targets=["q_einsum", "down_proj"])
    adapted = lnnx.adapt(blocks, config, rngs=nnx.Rngs(1))
    assert nnx.graphdef(adapted[0]) == nnx.graphdef(adapted[1])


def test_what_the_config_trains_is_a_variable_of_its_own():
    base = Mlp(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = adapt(base, targets=["layer_0"], train=["layer_1"], bias="lora_only")
    trained = nnx.to_flat_state(nnx.state(model, lnnx.Trained))
    names = {"/".join(path) for path, _ in trained}
    assert names == {
        *("layer_0/bias", "layer_0/lora_a", "layer_0/lora_b"),
        *("layer_1/bias", "layer_1/kernel"),
    }
    assert {leaf.dtype.name for _, leaf in trained} == {"float32"}
    assert model.layer_0.kernel is base.layer_0.kernel
    assert type(base.layer_1.kernel) is nnx.Param
    assert base.layer_1.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(model(X), base(X))
    merged = lnnx.merge(model)
    assert type(merged.layer_1.kernel) is nnx.Param


def test_dropout_follows_train_eval_and_view():
    model = train_a_little(adapt(Mlp(), dropout_rate=0.5))
    silent = train_a_little(adapt(Mlp()))
    assert np.abs(model(X) - model(X)).max() > 0
    assert model.layer_0.lora_rngs.key != model.layer_1.lora_rngs.key
    quiet = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(quiet(X), silent(X))
    model.eval()
    np.testing.assert_array_equal(model(X), silent(X))
    model.train()
    assert np.abs(model(X) - silent(X)).max() > 0
    assert not hasattr(silent.layer_0, "deterministic")


def test_dora_starts_silent_and_merges():
    base = Mlp()
    model = adapt(base, dora=True)
    np.testing.assert_array_equal(model(X), base(X))
    model = train_a_little(model)
    assert_close(lnnx.merge(model)(X), model(X))
    (first, _) = lnnx.merge_errors(model)
    assert first.path == "layer_0"
    assert first.relative < 1e-5


class Doubled(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


def test_an_override_that_calls_up_keeps_its_arithmetic_around_the_adapter():
    base = Doubled(6, 5, rngs=nnx.Rngs(0))
    model = adapt(base, targets=".*")
    assert isinstance(model, Doubled)
    np.testing.assert_array_equal(model(X), base(X))
    model = train_a_little(model)
    a, b, kernel = (getattr(model, n)[...] for n in ("lora_a", "lora_b", "kernel"))
    assert_close(model(X), 2 * (X @ (kernel + 3 * a @ b)))
    assert type(lnnx.merge(model)) is Doubled


class Replaced(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return inputs @ jnp.square(self.kernel[...])


class Unknown(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((6, 5)))
        self.head = nnx.Linear(6, 5, rngs=nnx.Rngs(0))


def test_a_layer_without_a_rule_is_refused_by_name_and_told_for_all_linear():
    with pytest.raises(
        ValueError, match=r"'kernel', a weight of Replaced.*`register_l"
    ):
        adapt(Replaced(6, 5, rngs=nnx.Rngs(0)), targets=".*")
    with pytest.raises(ValueError, match=r"'w', a weight of Unknown"):
        adapt(Unknown(), targets=["w", "head"])
    with pytest.warns(UserWarning, match=r"does not adapt w \(Unknown\)"):
        adapt(Unknown())
    masked = nnx.Conv(6, 5, (1,), mask=jnp.ones((1, 6, 5)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a weight of Conv"):
        adapt(masked, targets=".*")
    wrapped = nnx.WeightNorm(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rewrites its weights on each call"):
        adapt(wrapped, targets=["layer_instance"])


class Transposed(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (5, 6)))

    def __call__(self, x):
        return x @ self.w.T


def test_a_registered_layer_is_adapted_by_its_equation():
    lnnx.register_layer(Transposed, "...i,oi->...o", weight="w")
    model = train_a_little(adapt(Transposed()))
    assert model.lora_a.shape == (6, 2)
    assert_close(lnnx.merge(model)(X), model(X))
    with pytest.raises(TypeError, match="must be an NNX module class; got 'Linear'"):
        lnnx.register_layer("Linear", "...i,io->...o")  # pyright: ignore[reportArgumentType] - on purpose


class Squared(Einsum):
    """A duck that doesn't quack: its weight is transformed before use."""

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, jnp.square(self.w[...]))


class Square(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((6, 6)))

    def __call__(self, x):
        return x @ self.w


def test_an_equation_must_reproduce_its_layer():
    kinds = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
    message = "'w', a weight of {}, which can't be adapted: its equation does not repro"
    with pytest.raises(ValueError, match=message.format("Squared")):
        adapt(Squared("bi,io->bo", (6, 5), **kinds), targets=".*")
    lnnx.register_layer(Square, "...i,oi->...o", weight="w")
    with pytest.raises(ValueError, match=message.format("Square")):
        lnnx.find_targets(nnx.eval_shape(Square), LoRAConfig(targets=".*"))
    lnnx.register_layer(Square, "...i,io->...o", weight="w")
    assert adapt(Square(), targets=".*").lora_a.shape == (6, 2)


def rounding_dot(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, jnp.round(4 * kernel) / 4, *args, **kwargs)


def test_a_transformed_kernel_is_adapted_but_never_merged():
    kinds = {"dot_general": rounding_dot, "rngs": nnx.Rngs(0)}
    base = nnx.Linear(6, 5, **kinds)
    model = train_a_little(adapt(base, targets=".*"))
    assert_close(model(X) - base(X), 3 * (X @ model.lora_a[...]) @ model.lora_b[...])
    own = lnnx.LoRALinear(6, 5, lora=LoRAConfig(rank=2), **kinds)
    for made in (model, own):
        with pytest.raises(
            ValueError, match="can't be merged: their modules transform"
        ):
            lnnx.merge(made)
    with pytest.raises(ValueError, match="dora=True needs the kernel that"):
        adapt(base, targets=".*", dora=True)


class TiedByHand(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 6, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return nnx.gelu(self.embed(ids)) @ self.embed.embedding[...].T


def test_a_merge_that_would_change_the_output_is_told_by_an_example():
    ids = jnp.array([[1, 4, 2]])
    model = train_a_little(adapt(TiedByHand(), targets=["embed"]))
    with pytest.raises(ValueError, match="merged model differs from the adapted one"):
        lnnx.merge(model, ids)
    off = lnnx.merge(model)(ids) - model(ids)
    assert np.abs(off).max() > 0.1
    silent = adapt(TiedByHand(), targets=["embed"])
    np.testing.assert_array_equal(lnnx.merge(silent, ids)(ids), silent(ids))
    mlp = train_a_little(adapt(Mlp()))
    assert_close(lnnx.merge(mlp, x=X)(X), mlp(X))


def test_each_expert_has_the_adapter_of_the_linen_side():
    class LinenExperts(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            w = self.param("w", nn.initializers.normal(), (3, 6, 5))
            return jax.lax.ragged_dot(x, w, sizes)

    lora_jax.register_layer(LinenExperts, "mi,eio->mo", weight="w")
    sizes, config = jnp.array([2, 0, 1]), LoRAConfig(rank=2, alpha=6)
    base = Experts(6, 5, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    model = lnnx.adapt(base, config, rngs=nnx.Rngs(1))
    (target,) = lnnx.lora_targets(model)
    assert target.kind == "experts"
    assert target.leaf_shapes == {"lora_a": (3, 6, 2), "lora_b": (3, 2, 5)}
    linen = lora_jax.adapt(LinenExperts(), config, X, sizes)
    variables = linen.attach({"w": base.w[...]}, jax.random.key(1))
    np.testing.assert_array_equal(model.lora_a[...], variables["lora"]["lora_a"])
    model = train_a_little(model)
    kernel = base.w[...] + 3 * model.lora_a[...] @ model.lora_b[...]
    wanted = jnp.einsum("mi,mio->mo", X, kernel[jnp.array([0, 0, 2])])
    assert_close(model(X, sizes), wanted)


class DenseGeneral(nnx.Module):
    """As in MaxText: the axes are attributes of their own names."""

    def __init__(self, inputs, outputs, axis=-1):
        self.in_features_shape, self.out_features_shape = inputs, outputs
        self.axis = axis
        shape = (*inputs, *outputs) if axis != -1 else (inputs, *outputs)
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), shape))

    def __call__(self, x):
        axes = len(self.axis) if isinstance(self.axis, tuple) else 1
        return jnp.tensordot(x, self.kernel[...], axes)


@pytest.mark.parametrize(
    ("inputs", "outputs", "axis"), [(6, (2, 3), -1), ((2, 3), (5,), (-2, -1))]
)
def test_a_dense_layer_of_maxtext_is_known_by_its_attributes(inputs, outputs, axis):
    model = train_a_little(adapt(DenseGeneral(inputs, outputs, axis)))
    x = X if axis == -1 else X.reshape(3, 2, 3)
    assert_close(lnnx.merge(model)(x), model(x))


class ShardedLinear(nnx.Module):
    """As in Bonsai: the sharding of the output must be given."""

    def __init__(self, inputs, outputs, dtype=jnp.float32):
        initializer = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(
            initializer(jax.random.key(0), (inputs, outputs), dtype)
        )
        self.bias = nnx.data(jnp.zeros((outputs,), dtype))

    def __call__(self, x, *, out_sharding):
        return jnp.matmul(x, self.kernel, out_sharding=out_sharding) + self.bias


class ShardedEmbedding(nnx.Embed):
    """As in Bonsai: flax's arithmetic, written again."""

    def __call__(self, inputs, *, out_sharding):
        return self.embedding[...].at[inputs].get(out_sharding=out_sharding)

    def attend(self, query, *, out_sharding):
        return jnp.dot(query, self.embedding[...].T, out_sharding=out_sharding)


class Bonsai(nnx.Module):
    def __init__(self):
        self.embed = ShardedEmbedding(7, 6, rngs=nnx.Rngs(0))
        self.proj = ShardedLinear(6, 6)
        self.odd = SquaredKernel(6, 6)

    def __call__(self, ids):
        x = self.odd(self.proj(self.embed(ids, out_sharding=None), out_sharding=None))
        return self.embed.attend(x, out_sharding=None)


class SquaredKernel(ShardedLinear):
    def __call__(self, x):
        return x @ jnp.square(self.kernel[...])


def test_layers_of_bonsai_are_known_by_what_they_compute():
    base, ids = Bonsai(), jnp.array([[1, 4, 2]])
    model = adapt(base, targets=["proj", "embed"])
    np.testing.assert_array_equal(model(ids), base(ids))
    model = train_a_little(model)
    assert_close(lnnx.merge(model, ids)(ids), model(ids))
    with pytest.warns(
        UserWarning, match=r"does not adapt odd/kernel \(SquaredKernel\)"
    ):
        assert [t.path for t in lnnx.find_targets(base, LoRAConfig())] == ["proj"]
    large = nnx.eval_shape(lambda: ShardedLinear(8192, 8192, jnp.bfloat16))
    assert len(lnnx.find_targets(large, LoRAConfig(targets=".*"))) == 1
    wrong = nnx.eval_shape(lambda: SquaredKernel(8192, 4096))
    with pytest.raises(ValueError, match="its equation does not reproduce its output"):
        lnnx.find_targets(wrong, LoRAConfig(targets=".*"))


def test_stacked_layers_are_told_by_the_shape_that_they_declare():
    make = nnx.split_rngs(splits=4)(
        nnx.vmap(lambda rngs: nnx.Linear(6, 5, rngs=rngs), out_axes=1)
    )
    (target,) = lnnx.find_targets(make(nnx.Rngs(0)), LoRAConfig(rank=2))
    assert target.kernel_shape == (6, 4, 5)
    assert target.leaf_shapes == {"lora_a": (6, 4, 2), "lora_b": (2, 4, 5)}
    with pytest.raises(ValueError, match=r"1 possible|`stack_axis=0`"):
        lnnx.find_targets(make(nnx.Rngs(0)), LoRAConfig(targets=".*"), stack_axis=0)


def test_a_stack_as_long_as_a_side_asks_for_its_axis():
    make = nnx.split_rngs(splits=6)(nnx.vmap(lambda r: nnx.Linear(6, 5, rngs=r)))
    stack, config = make(nnx.Rngs(0)), LoRAConfig(rank=2, alpha=6, targets=".*")
    with pytest.raises(ValueError, match=r"with 2 possible layer axes. Give `adapt`"):
        lnnx.find_targets(stack, config)
    model = lnnx.adapt(stack, config, rngs=nnx.Rngs(1), stack_axis=0)
    model = train_a_little(model)
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    assert_close(run(lnnx.merge(model), X), run(model, X))


def test_clear_errors():
    model, config = Mlp(), LoRAConfig(rank=2)
    rngs = nnx.Rngs(1)
    with pytest.raises(
        TypeError, match=r"got LinenMlp, a flax.linen one: use `lora_jax"
    ):
        lnnx.adapt(LinenMlp(), config, rngs=rngs)  # pyright: ignore[reportArgumentType] - on purpose
    with pytest.raises(TypeError, match=r"got Mlp, a flax.nnx one: use `lora_jax.nnx"):
        lora_jax.adapt(model, config)  # pyright: ignore[reportArgumentType] - on purpose
    with pytest.raises(TypeError, match=r"config must be a LoRAConfig; got dict"):
        lnnx.adapt(model, {}, rngs=rngs)  # pyright: ignore[reportArgumentType] - on purpose
    with pytest.raises(TypeError, match=r"rngs must be nnx.Rngs; got int"):
        lnnx.adapt(model, config, rngs=1)  # pyright: ignore[reportArgumentType] - on purpose
    with pytest.raises(ValueError, match=r"a stream 'params', or a default one"):
        lnnx.adapt(model, config, rngs=nnx.Rngs(dropout=1))
    with pytest.raises(ValueError, match=r"already has LoRA layers, such as 'layer_0'"):
        adapt(adapt(model))
    with pytest.raises(ValueError, match="already has LoRA layers, such as 'lora'"):
        adapt(nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs))
    with pytest.raises(ValueError, match=r"\"layr_1\"\] matched 0 of 2.*mean: layer_1"):
        adapt(model, targets=["layr_1"])
    with pytest.raises(ValueError, match="rank must be from 1 to 5, the smaller"):
        adapt(model, rank=6, init="pissa")
    with pytest.raises(ValueError, match=r"must have adapted layers; got none"):
        lnnx.merge(model)
    bad = Mlp()
    bad.layer_0.kernel.set_value(jnp.full((6, 5), jnp.nan))
    with pytest.raises(ValueError, match="layer_0/kernel contain NaN"):
        adapt(bad)


def test_a_model_is_adapted_while_it_is_made_and_planned_while_it_is_abstract():
    class Scaled(Mlp):
        def __init__(self):
            super().__init__()
            self.temperature = nnx.Param(1.0)

    made = nnx.jit(lambda: adapt(Scaled()))()
    wanted = adapt(Scaled())
    assert_close(made.layer_1.lora_a[...], wanted.layer_1.lora_a[...])
    targets = lnnx.find_targets(nnx.eval_shape(Mlp), LoRAConfig(rank=2, alpha=6))
    assert targets == lnnx.lora_targets(made)
    with pytest.raises(TypeError, match=r"layer_0/kernel is abstract.*`find_targets`"):
        adapt(nnx.eval_shape(Mlp))
    shapes = nnx.eval_shape(lambda model: adapt(model), nnx.eval_shape(Mlp))
    assert shapes.layer_1.lora_a.shape == wanted.layer_1.lora_a.shape


def test_a_rank_above_the_smaller_side_warns_but_of_vera():
    with pytest.warns(UserWarning, match="rank 6 exceeds the smaller side"):
        adapt(Mlp(), rank=6)
    model = train_a_little(adapt(Mlp(), rank=9, vera=True))
    assert_close(lnnx.merge(model, X)(X), model(X))


def test_a_linen_module_in_an_nnx_model_is_adapted_before_it_is_wrapped():
    x = jnp.ones((2, 6))

    def wrapped(module):
        return nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), x)

    with pytest.raises(ValueError, match=r"can't adapt .*the Linen module LinenMlp"):
        adapt(wrapped(LinenMlp()))
    config = LoRAConfig(rank=2)
    model = wrapped(lora_jax.adapt(LinenMlp(), config, x))  # as the error says
    assert model.layer_0["lora_a"].shape == (6, 2)


def test_an_array_of_two_modules_has_two_adapters_but_no_merged_value():
    model = Mlp()
    model.layer_0, model.twin = (nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(2))
    model.twin.kernel = model.layer_0.kernel
    adapted = adapt(model)
    assert adapted.twin.kernel is adapted.layer_0.kernel
    assert adapted.twin.lora_a is not adapted.layer_0.lora_a
    with pytest.raises(ValueError, match=r"layer_0/kernel and twin/kernel are one"):
        lnnx.merge(adapted)
    with pytest.warns(UserWarning, match=r"layer_0/kernel is adapted, and twin/kernel"):
        adapt(model, targets=["layer_0"])
