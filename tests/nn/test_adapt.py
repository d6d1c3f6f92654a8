"""`adapt` beyond the laws: methods, flags, collections, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, lora_dense
from lora_jax.tree.paths import flatten
from tests.nn.external_models import MODELS, External, assert_same_tree, trained
from tests.nn.external_modules import Expert
from tests.nn.tools import key, normal
from tests.reference import assert_close

CASES: dict[str, External] = {case.name: case for case in MODELS}
X = normal((2, 6))
EXPERT = {
    "up": {"kernel": normal((6, 12)), "bias": normal((12,))},
    "down": {"kernel": normal((12, 6)), "bias": normal((6,))},
}


def expert(**fields):
    config = LoRAConfig(**{"rank": 2, "alpha": 6, **fields})
    return adapt(Expert(), config, X)


class Dropping(nn.Module):
    rate: float = 0.5
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        off = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = nn.Dropout(self.rate)(nn.Dense(12, name="up")(x), deterministic=off)
        return nn.Dense(6, name="down")(x)


class Trains(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(6, name="up")(x)


# --- methods and collections ---


def test_every_way_to_name_a_method_is_equivalent():
    case = CASES["encoder_decoder"]
    params = case.variables()["params"]
    adapted = adapt(case.model, case.config(), *case.args)
    variables = trained(adapted.attach(params, key(1)))
    merged = {"params": adapted.merge(variables)}
    ids = case.args[0]
    wanted = jax.jit(functools.partial(case.model.apply, method="encode"))(merged, ids)
    model_type = type(case.model)
    for method in ("encode", model_type.encode, lambda model, x: model.encode(x)):
        apply = jax.jit(functools.partial(adapted.apply, method=method))
        got = apply(variables, ids)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_batch_statistics_pass_through():
    case = CASES["resnet"]
    made = case.variables()
    adapted = adapt(case.model, case.config(), *case.args, train=False)
    variables = {
        **adapted.attach(made["params"], key(1)),
        "batch_stats": made["batch_stats"],
    }
    apply = functools.partial(adapted.apply, mutable=["batch_stats"])
    got, state = jax.jit(functools.partial(apply, train=True))(variables, *case.args)
    base = functools.partial(case.model.apply, mutable=["batch_stats"], train=True)
    wanted, base_state = jax.jit(base)(made, *case.args)
    np.testing.assert_array_equal(got, wanted)
    assert_same_tree(state, base_state)


def test_a_decode_cache_passes_through():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    x = normal((1, 3, 8))
    made = jax.jit(model.init)(key(0), x)
    adapted = adapt(model, LoRAConfig(rank=2), x)
    variables = trained(adapted.attach(made["params"], key(1)))
    merged = {"params": adapted.merge(variables)}
    cache = base_cache = made["cache"]
    read, read_base = (
        jax.jit(functools.partial(module.apply, mutable=["cache"]))
        for module in (adapted, model)
    )
    for t in range(3):
        token = x[:, t : t + 1]
        got, state = read({**variables, "cache": cache}, token)
        wanted, base_state = read_base({**merged, "cache": base_cache}, token)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        cache, base_cache = state["cache"], base_state["cache"]
    assert int(cache["cache_index"]) == 3


def test_sown_and_captured_values_are_those_of_the_merged_model():
    case = CASES["child_model"]
    adapted = adapt(case.model, case.config(), *case.args)
    variables = trained(adapted.attach(case.variables()["params"], key(1)))
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, got = adapted.apply(variables, *case.args, **options)
    merged = {"params": adapted.merge(variables)}
    _, wanted = case.model.apply(merged, *case.args, **options)
    got, wanted = (flatten(tree["intermediates"]) for tree in (got, wanted))
    assert set(got) == set(wanted)
    for path in wanted:
        assert_close(got[path][0], wanted[path][0])


def test_all_collections_may_be_mutable():
    adapted = expert()
    variables = adapted.attach(EXPERT, key(1))
    y, out = adapted.apply(variables, X, mutable=True)
    np.testing.assert_array_equal(y, Expert().apply({"params": EXPERT}, X))
    assert_same_tree(out, variables)


class Classifier(nn.Module):
    encoder: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.encoder(x))


def test_an_adapted_model_works_as_a_submodule():
    adapted = expert(train=["down/bias"])
    made = jax.jit(Classifier(adapted).init)(key(0), X)
    assert set(made["params"]) == {"head", "encoder"}
    assert set(flatten(made["params"]["encoder"])) == {"down/bias"}
    parts = adapted.attach(EXPERT, key(1))
    variables = {name: {"encoder": part} for name, part in parts.items()}
    variables["params"]["head"] = made["params"]["head"]
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, made)
    merged = {"encoder": EXPERT, "head": made["params"]["head"]}
    wanted = Classifier(Expert()).apply({"params": merged}, X)
    np.testing.assert_array_equal(Classifier(adapted).apply(variables, X), wanted)


class Stack(nn.Module):
    part: nn.Module

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda part, x, _: (x + part(x), None),
            variable_axes={"frozen": 0, "lora": 0, "params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(self.part, x, None)[0]


def test_an_adapted_model_is_scanned():
    made = Stack(expert()).init(key(0), X)
    assert made["lora"]["part"]["up"]["lora_a"].shape == (3, 6, 2)
    plain = {"params": made["frozen"]}
    np.testing.assert_array_equal(
        Stack(expert()).apply(made, X), Stack(Expert()).apply(plain, X)
    )


def test_jit_inside_the_model_distinguishes_adapters():
    case = CASES["jitted"]
    params = case.variables()["params"]
    case.model.apply({"params": params}, *case.args)  # fills nn.jit's cache
    lora = None
    for alpha in (2.0, 9.0):
        adapted = adapt(case.model, case.config(alpha=alpha), *case.args)
        variables = trained(adapted.attach(params, key(1)))
        lora = lora or variables["lora"]
        variables["lora"] = lora
        got = adapted.apply(variables, *case.args)
        wanted = case.model.apply({"params": adapted.merge(variables)}, *case.args)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_second_call_compiles_nothing():
    adapted = expert()
    variables = adapted.attach(EXPERT, key(1))
    apply = jax.jit(adapted.apply)
    apply(variables, X)
    apply(trained(variables), X + 1)
    assert apply._cache_size() == 1


# --- parameters ---


@pytest.mark.parametrize(
    "convert",
    [nn.FrozenDict, lambda tree: jax.tree.map(np.asarray, tree)],
    ids=["frozen", "numpy"],
)
def test_any_mapping_of_any_arrays_is_accepted(convert):
    params = convert(EXPERT)
    variables = expert().attach(params, key(1))
    assert variables["frozen"]["up"]["kernel"] is params["up"]["kernel"]
    np.testing.assert_array_equal(
        expert().apply(variables, X), Expert().apply({"params": EXPERT}, X)
    )


def test_trained_leaves_live_in_params():
    variables = expert(targets=["up"], train=["down"]).attach(EXPERT, key(1))
    assert set(flatten(variables["params"])) == {"down/kernel", "down/bias"}
    assert set(flatten(variables["lora"])) == {"up/lora_a", "up/lora_b"}
    assert_same_tree(expert(targets=["up"], train=["down"]).detach(variables), EXPERT)


class Normed(nn.Module):
    dtype: str | None

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(6, dtype=self.dtype, name="up")(x)


@pytest.mark.parametrize(
    ("dtype", "half", "wanted"),
    [
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "float16", "float32"),
        (None, "bfloat16", "bfloat16"),  # else the output would be float32
    ],
)
def test_half_precision_is_trained_in_float32_where_no_output_changes(
    dtype, half, wanted
):
    model, x = Normed(dtype), X.astype(half)
    params = {
        "norm": {"scale": 1 + normal((6,)), "bias": normal((6,))},
        "up": {"kernel": normal((6, 6)), "bias": normal((6,))},
    }
    params = jax.tree.map(lambda leaf: leaf.astype(half), params)
    adapted = adapt(model, LoRAConfig(rank=2, train=["norm"], bias="lora_only"), x)
    variables = adapted.attach(params, key(1))
    assert set(flatten(variables["params"])) == {"norm/scale", "norm/bias", "up/bias"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {
        wanted
    }
    assert variables["frozen"]["up"]["kernel"] is params["up"]["kernel"]
    got, base = adapted.apply(variables, x), model.apply({"params": params}, x)
    assert got.dtype == base.dtype
    np.testing.assert_array_equal(got, base)
    merged = adapted.merge(trained(variables))
    assert merged["up"]["kernel"].dtype == half
    assert merged["norm"]["scale"].dtype == wanted


@pytest.mark.parametrize("targets", ["all-linear", ["Dense_0", "query"]], ids=str)
def test_lora_only_trains_the_biases_of_adapted_layers_and_no_norms(targets):
    case = CASES["vit"]
    config = case.config(targets=targets, bias="lora_only")
    adapted = adapt(case.model, config, *case.args)
    params = case.variables()["params"]
    attached = adapted.attach(params, key(1))
    biases = {f"{row.path}/bias" for row in adapted.targets(params)}
    assert set(flatten(attached["params"])) == biases
    made = jax.eval_shape(lambda k: adapted.init(k, *case.args), key(0))
    assert set(flatten(made["params"])) == biases
    got = jax.jit(adapted.apply)(attached, *case.args)
    wanted = jax.jit(case.model.apply)({"params": params}, *case.args)
    np.testing.assert_array_equal(got, wanted)


def test_fully_trained_layers_get_no_adapter():
    model = Classifier(Expert())
    params = {
        "encoder": EXPERT,
        "head": {"kernel": normal((6, 2)), "bias": normal((2,))},
    }
    variables = adapt(model, LoRAConfig(rank=2, train=["encoder"]), X).attach(
        params, key(1)
    )
    assert set(flatten(variables["lora"])) == {"head/lora_a", "head/lora_b"}


def test_adding_a_target_changes_no_other_adapter():
    one = expert(targets=["down"]).attach(EXPERT, key(1))["lora"]
    both = expert().attach(EXPERT, key(1))["lora"]
    assert_same_tree(both["down"], one["down"])


def test_merging_works_under_jit_and_keeps_bfloat16():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), EXPERT)
    adapted = expert()
    variables = trained(adapted.attach(half, key(1)))
    merged = jax.jit(adapted.merge)(variables)
    assert_same_tree(merged, adapted.merge(variables))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    for row in adapted.merge_errors(variables):
        assert 0 < row.relative < 0.01  # a large update, rounded once


def test_merging_rejects_nan_and_leaves_the_base_unchanged():
    adapted = expert()
    variables = adapted.attach(EXPERT, key(1))
    variables["lora"]["up"]["lora_b"] = jnp.full((2, 12), jnp.nan)
    variables["lora"]["down"]["lora_a"] = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        adapted.merge(variables)
    assert "down/lora_a must be (12, 2); got (3, 2)" in str(error.value)
    assert "up/lora_b contains NaN or infinity" in str(error.value)
    assert_same_tree(adapted.detach(variables), EXPERT)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), EXPERT)
    variables = adapted.attach(half, key(1))
    variables["lora"]["up"]["lora_b"] = jnp.full((2, 12), 1e6)
    with pytest.raises(ValueError, match="merged kernels must be finite; up/kernel "):
        adapted.merge(variables)


# --- dropout ---


def dropping(**fields):
    config = LoRAConfig(rank=2, dropout_rate=0.5)
    adapted = adapt(Dropping(**fields), config, X, deterministic=True)
    variables = trained(adapted.attach(EXPERT, key(1)))
    return adapted.clone(deterministic=None), variables


@pytest.mark.parametrize("call", ["keyword", "position"])
def test_dropout_is_disabled_if_the_call_is_deterministic(call):
    adapted, variables = dropping(rate=0.0)
    args, kwargs = (
        ((True,), {}) if call == "position" else ((), {"deterministic": True})
    )
    quiet = adapted.apply(variables, X, *args, **kwargs)
    merged = {"params": adapted.merge(variables)}
    wanted = Dropping(0.0).apply(merged, X, True)
    assert_close(quiet, wanted)


def test_dropout_follows_attributes():
    adapted, variables = dropping(rate=0.0)
    quiet = adapted.apply(variables, X, True)
    own = dropping(rate=0.0, deterministic=True)[0]
    np.testing.assert_array_equal(own.apply(variables, X), quiet)
    silenced = adapted.clone(deterministic=True)
    np.testing.assert_array_equal(silenced.apply(variables, X, False), quiet)


def test_dropout_follows_a_train_flag_and_its_default():
    adapted = adapt(Trains(), LoRAConfig(rank=2, dropout_rate=0.5), X)
    params = {"up": {"kernel": normal((6, 6)), "bias": normal((6,))}}
    variables = trained(adapted.attach(params, key(1)))
    quiet = adapted.apply(variables, X)
    np.testing.assert_array_equal(adapted.apply(variables, X, train=False), quiet)
    loud = adapted.apply(variables, X, train=True, rngs={"dropout": key(2)})
    assert not np.array_equal(loud, quiet)


def test_adapter_dropout_does_not_change_the_models_own_dropout():
    adapted, variables = dropping()
    fresh = adapted.clone(deterministic=True).attach(EXPERT, key(1))
    rngs = {"dropout": key(2)}
    wanted = Dropping().apply({"params": EXPERT}, X, False, rngs=rngs)
    np.testing.assert_array_equal(adapted.apply(fresh, X, False, rngs=rngs), wanted)
    one = adapted.apply(variables, X, False, rngs=rngs)
    np.testing.assert_array_equal(adapted.apply(variables, X, False, rngs=rngs), one)
    other = adapted.apply(variables, X, False, rngs={"dropout": key(3)})
    assert not np.array_equal(one, other)


def test_dropout_without_a_key_raises_a_clear_error():
    adapted, variables = dropping(rate=0.0)
    message = r"rngs must have 'dropout' for dropout_rate=0.5 of the adapter at 'up'"
    with pytest.raises(ValueError, match=message):
        adapted.apply(variables, X, False)


def test_tabulate_shows_base_and_adapters():
    adapted = adapt(nn.Dense(5), LoRAConfig(rank=2, targets=".*"))
    table = adapted.tabulate(jax.random.key(0), jnp.ones((2, 3)))
    assert "Adapted" in table
    assert "frozen" in table
    assert "lora" in table


def test_merging_without_adapters_names_the_missing_adapters():
    adapted = adapt(nn.Dense(5), LoRAConfig(rank=2, targets=".*"))
    params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"lora_a is missing; lora_b is missing"):
        adapted.merge({"frozen": params})
    with pytest.raises(ValueError, match=r"Pass variables\['params'\]"):
        adapted.attach({"params": params}, jax.random.key(0))


def test_gradients_pass_through_shard_map_with_replicated_adapters():
    """With `check_vma`, the gradient of a replicated array is summed over devices."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = jnp.ones((4, 3)), jnp.ones((3, 5))
    a, b = jnp.ones((3, 2)), jnp.ones((2, 5))

    def loss(a, b, x):
        return jnp.sum(lora_dense(x, w, a, b, scaling=2.0) ** 2)

    def mapped(a, b, x):
        return jax.lax.psum(loss(a, b, x), "x")

    whole, rows = jax.P(), jax.P("x")
    grad = jax.shard_map(
        jax.grad(mapped, argnums=(0, 1, 2)),
        mesh=mesh,
        in_specs=(whole, whole, rows),
        out_specs=(whole, whole, rows),
    )
    jax.tree.map(
        np.testing.assert_allclose,
        jax.jit(grad)(a, b, x),
        jax.grad(loss, argnums=(0, 1, 2))(a, b, x),
    )
