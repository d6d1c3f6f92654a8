"""Methods other than LoRA and DoRA, in modules: one line of config each."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lora_jax import (
    LoRAAttention,
    LoRAConfig,
    LoRADense,
    LoRAEmbed,
    TrainState,
    adapt,
    eva_init,
    load_adapter,
    lora_ga_init,
    make_mesh,
    make_sharding,
    make_train_step,
    merge_lora_layers,
    save_adapter,
    shard_variables,
)
from lora_jax.tree.partition import adapter_of
from lora_jax.tree.paths import flatten
from lora_jax.tree.plain import plain_config, plain_targets, plain_variables
from tests.nn.external_models import MODELS, assert_same_tree
from tests.nn.tools import key, normal
from tests.reference import assert_close

CASES = {case.name: case for case in MODELS}
METHODS = {"pissa": {"init": "pissa"}, "olora": {"init": "olora", "rslora": True}}
METHODS["lora_fa"] = {"lora_fa": True}
METHODS["pissa with dora"] = {"init": "pissa_niter_4", "dora": True}
METHODS["vera"] = {"vera": True, "vera_seed": 5}
METHODS["vera with dora"] = {"vera": True, "dora": True}


@functools.cache
def attached(name: str, method: str):
    """An external model, adapted, with variables fresh and after some training."""
    case = CASES[name]
    adapted = adapt(case.model, case.config(**METHODS[method]), *case.args)
    base = case.variables()["params"]
    fresh = jax.jit(adapted.attach)(base, key(1))
    return case, adapted, base, fresh, moved(fresh)


def moved(variables):
    """Changes all that is trained, a little."""
    flat, tree = jax.tree.flatten(variables["lora"])
    flat = [x + 0.1 * normal(x.shape, seed=i) for i, x in enumerate(flat)]
    return {**variables, "lora": jax.tree.unflatten(tree, flat)}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("scanned_axis_1", "pissa with dora"),
        ("odds", "olora"),
        ("scanned_axis_1", "vera with dora"),
        ("odds", "vera"),
    ],
)
def test_a_method_is_silent_merges_and_is_plain_lora(name, method):
    case, adapted, base, fresh, trained = attached(name, method)

    def base_of(params):
        return case.model.apply({"params": params}, *case.args, **case.kwargs)

    def output(module, variables):
        return jax.jit(module.apply)(variables, *case.args, **case.kwargs)

    wanted = jax.jit(base_of)(base)
    jax.tree.map(assert_close, output(adapted, fresh), wanted)
    got = output(adapted, trained)
    differ = jax.tree.map(lambda x, y: bool((abs(x - y) > 1e-3).any()), got, wanted)
    assert any(jax.tree.leaves(differ))
    merged = adapted.merge(trained, check=False)
    jax.tree.map(assert_close, got, jax.jit(base_of)(merged))
    assert_same_tree(adapted.unmerge(merged, trained), base)

    targets, config = adapted.targets(base), adapted.config
    plain = adapt(case.model, plain_config(config), *case.args)
    rows = plain.targets(base)
    for found, row in zip(plain_targets(targets, config), rows, strict=True):
        assert found.scaling == pytest.approx(row.scaling)
        numbers = {"alpha": row.alpha, "scaling": row.scaling}
        assert dataclasses.replace(found, **numbers) == row
    times = 2 if config.starts_from_base else 1
    assert rows[0].rank == times * targets[0].rank
    assert rows[0].scaling == pytest.approx(targets[0].scaling)
    jax.tree.map(assert_close, got, output(plain, plain_variables(trained, targets)))


def test_only_a_and_b_are_trained():
    case, adapted, base, fresh, _ = attached("odds", "olora")
    leaves = ["lora_a", "lora_b"]
    rank = case.rank
    for target in adapted.targets(base):
        shapes = target.leaf_shapes
        assert target.trainable == sum(int(np.prod(shapes[n])) for n in leaves)
        assert {"start_a", "start_b"} <= {*shapes}
        assert target.rank == rank
    names = {path.rpartition("/")[2] for path in flatten(fresh["lora"])}
    assert names == {*leaves}
    assert flatten(fresh["fixed"]).keys() == {
        path.replace("lora_", "start_")
        for path in flatten(fresh["lora"])
        if "lora_" in path
    }
    state = TrainState.create(fresh, optax.adam(0.1), key(0))
    moments = len(jax.tree.leaves(state.opt_state[0].mu))
    assert moments == len(jax.tree.leaves(fresh["lora"]))

    def loss(variables, batch, rngs):
        del batch, rngs
        y = adapted.apply(variables, *case.args, **case.kwargs)
        total = jax.tree.reduce(lambda sum, leaf: sum + jnp.sum(leaf**2), y, 0.0)
        return jnp.asarray(total), jnp.ones(()), {}

    state, _ = make_train_step(loss, optax.adam(0.1))(state, jnp.ones(1))
    assert_same_tree(state.frozen, {k: fresh[k] for k in ("frozen", "fixed")})
    changed = jax.tree.map(
        lambda x, y: bool((x != y).any()), state.trainable["lora"], fresh["lora"]
    )
    assert all(jax.tree.leaves(changed))  # B isn't 0, so that A moves at once


def test_an_adapter_file_holds_the_start(tmp_path):
    _, adapted, _, fresh, trained = attached("odds", "olora")
    save_adapter(tmp_path, trained, adapted.config, "1-00")
    found = load_adapter(tmp_path, expected=fresh)
    assert_same_tree({"frozen": fresh["frozen"], **found.variables}, trained)
    assert found.config == adapted.config
    save_adapter(tmp_path, {"lora": trained["lora"]}, adapted.config, "1-00")
    with pytest.raises(ValueError, match=r"fixed/.*start_a is missing"):
        load_adapter(tmp_path, expected=fresh)


def test_the_start_is_sharded_like_a_and_b():
    _, adapted, base, fresh, _ = attached("odds", "olora")
    rules = [("kernel", PartitionSpec("fsdp")), ("bias", PartitionSpec())]
    sharding = make_sharding(make_mesh(), rules)
    placed = shard_variables(fresh, sharding, adapted.targets(base))
    flat = {name: flatten(placed[name]) for name in ("lora", "fixed")}
    for path, leaf in flat["fixed"].items():
        twin = flat["lora"][path.replace("start_", "lora_")]
        assert leaf.sharding == twin.sharding


def test_vera_s_vectors_are_sharded_like_the_axes_that_they_have():
    _, adapted, base, *_ = attached("scanned_axis_1", "vera with dora")
    for target in adapted.targets(base):
        of_kernel = [f"axis {i}" for i in range(len(target.kernel_shape))]
        axes, shapes = target.leaf_axes(of_kernel), target.leaf_shapes
        assert axes["vera_b"] == axes["lora_b"]
        for name in ("vera_b", "vera_d"):
            pairs = zip(axes[name], shapes[name], strict=True)
            assert all(axis is None for axis, size in pairs if size == 1)
        layers = [of_kernel[axis] for axis in target.contraction.batch]
        assert [axis for axis in axes["vera_d"] if axis] == layers


class Scanned(nn.Module):
    """LoRA layers under `flax.linen.scan`."""

    lora: LoRAConfig

    @nn.compact
    def __call__(self, x):
        axes: Any = {"frozen": 0, "lora": 0, "fixed": 0}
        layer = nn.scan(
            lambda module, x, _: (jnp.tanh(module(x)), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=3,
        )
        return layer(LoRADense(5, lora=self.lora, name="up"), x, None)[0]


LAYERS = {
    "attention": (functools.partial(LoRAAttention, 2), (2, 3, 6)),
    "scanned": (Scanned, (4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lora_layers_take_methods(name):
    make, shape = LAYERS[name]
    layer = make(lora=LoRAConfig(rank=2, alpha=3, init="pissa", targets=".*"))
    x = normal(shape)
    variables = jax.jit(layer.init)(key(0), x)
    kernels = {p: k for p, k in flatten(variables["frozen"]).items() if "kernel" in p}
    assert len(flatten(variables["fixed"])) == 2 * len(kernels)
    plain = make(lora=LoRAConfig(targets=["nothing"]))
    wanted = plain.apply({"frozen": variables["frozen"]}, x)
    assert_close(layer.apply(variables, x), wanted)
    trained = moved(variables)
    merged = merge_lora_layers(layer, trained, x)
    got = layer.apply(trained, x)
    assert abs(got - wanted).max() > 1e-3
    assert_close(got, plain.apply({"frozen": merged}, x))


@pytest.mark.parametrize("method", ["__call__", "attend"])
def test_an_embedding_starts_from_its_table(method):
    config = LoRAConfig(rank=2, alpha=3, init="olora", dora=True, targets=".*")
    layer = LoRAEmbed(11, 5, lora=config)
    trained = moved(layer.init(key(0), jnp.arange(3)))
    x = normal((4, 5)) if method == "attend" else jnp.array([3, 0, 10])
    merged = merge_lora_layers(layer, trained, jnp.arange(3))
    wanted = nn.Embed(11, 5).apply({"params": merged}, x, method=method)
    assert_close(layer.apply(trained, x, method=method), wanted)


def test_variables_of_another_method_are_refused():
    x = normal((2, 5))
    config = LoRAConfig(rank=2, init="pissa", targets=".*")
    layer = LoRADense(6, lora=config)
    variables = layer.init(key(0), x)
    plain = LoRADense(6, lora=dataclasses.replace(config, init="uniform"))
    with pytest.raises(ValueError, match=r"'fixed'\] has 'start_a'.*init='uniform'"):
        plain.apply(variables, x)
    with pytest.raises(ValueError, match=r"variables\['fixed'\] must have 'start_a'"):
        layer.apply({k: variables[k] for k in ("frozen", "lora")}, x)
    adapted = adapt(nn.Dense(6), config, x)
    with pytest.raises(ValueError, match=r"'fixed' must have 'start_a'.*init='pissa'"):
        adapted.apply({k: variables[k] for k in ("frozen", "lora")}, x)
    bad = {**variables, "fixed": {**variables["fixed"], "start_a": jnp.ones((5, 3))}}
    with pytest.raises(ValueError, match=r"start_a of '' must be \(5, 2\); got \(5, 3"):
        adapted.apply(bad, x)
    assert adapter_of(variables).keys() == {"lora_a", "lora_b", "start_a", "start_b"}


def test_lora_fa_trains_b_alone():
    config = LoRAConfig(rank=2, alpha=3, lora_fa=True, targets=".*")
    x, layer = normal((4, 5)), LoRADense(6, use_bias=False, lora=config)
    variables = layer.init(key(0), x)
    assert (variables["lora"].keys(), variables["fixed"].keys()) == (
        {"lora_b"},
        {"lora_a"},
    )
    a, b = variables["fixed"]["lora_a"], normal((2, 6))
    assert abs(a).max() > 0
    wanted = x @ (variables["frozen"]["kernel"] + 1.5 * a @ b)
    assert_close(layer.apply({**variables, "lora": {"lora_b": b}}, x), wanted)
    rows = adapt(nn.Dense(6, use_bias=False), config, x).targets()
    assert [row.trainable for row in rows] == [12]


def test_vera_trains_two_vectors_and_its_layers_share_a_and_b():
    config = LoRAConfig(rank=3, alpha=2, vera=True, targets=".*")
    x, layer = normal((4, 5)), LoRADense(6, use_bias=False, lora=config)
    variables = layer.init(key(0), x)
    assert sorted(variables["lora"]) == ["vera_b", "vera_d"]
    d, b = normal((3, 1)), normal((1, 6), seed=1)
    trained = {**variables, "lora": {"vera_d": d, "vera_b": b}}
    lora_a, lora_b = (variables["fixed"][f"lora_{c}"] for c in "ab")
    wanted = x @ (variables["frozen"]["kernel"] + 2 / 3 * (lora_a @ (d * lora_b * b)))
    assert_close(layer.apply(trained, x), wanted)
    assert_same_tree(layer.init(key(1), x)["fixed"], variables["fixed"])
    model = nn.Sequential([nn.Dense(5), nn.Dense(5), nn.Dense(4)])
    adapted = adapt(model, dataclasses.replace(config, vera_seed=7), x)
    rows = adapted.targets()
    assert [row.trainable for row in rows] == [3 + 5, 3 + 5, 3 + 4]
    fixed = adapted.init(key(0), x)["fixed"]
    assert_same_tree(fixed["layers_0"], fixed["layers_1"])
    assert_same_tree(fixed["layers_0"]["lora_b"][:, :4], fixed["layers_2"]["lora_b"])
    assert abs(fixed["layers_0"]["lora_a"] - lora_a).max() > 0.1
    for other, why in (
        (LoRAConfig(rank=3, targets=".*"), r"'lora'\] has 'vera_d'.*vera=False"),
        (LoRAConfig(rank=3, targets=["other"]), r"'fixed'\] has 'lora_a'.*not target"),
    ):
        with pytest.raises(ValueError, match=why):
            layer.clone(lora=other).apply(trained, x)
    wrong = {**trained, "lora": {"vera_d": d[:2], "vera_b": b}}
    with pytest.raises(ValueError, match=r"vera_d of '' must be \(3, 1\); got \(2, 1"):
        layer.apply(wrong, x)
    lora = LoRAConfig(rank=3, alpha=2, targets=".*")
    with pytest.raises(ValueError, match=r"'vera_d' if and only.*vera is True; got"):
        adapt(nn.Dense(6), lora, x).apply({**trained, "params": {"bias": b[0]}}, x)


def test_methods_that_do_not_suit_an_embedding_are_refused():
    for fields, why in (
        ({"vera": True}, "vera=True can't adapt 'layers_0', an embedding: its A"),
        ({"init": "orthogonal"}, r"init='orthogonal' can't adapt 'layers_0', an emb"),
        (
            {"lora_fa": True},
            "lora_fa=True can't adapt 'layers_0', an embedding: its",
        ),
    ):
        config = LoRAConfig(rank=2, targets=".*", **fields)
        model = nn.Sequential([nn.Embed(11, 5, name="embed")])
        with pytest.raises(ValueError, match=why):
            adapt(model, config, jnp.arange(3)).targets()


def test_lora_ga_starts_from_the_gradient_of_w0():
    model = nn.Dense(6, use_bias=False)
    x, wanted = normal((2, 9, 7)), normal((2, 9, 6), seed=1)
    adapted = adapt(model, LoRAConfig(rank=2, init="lora_ga", targets=".*"), x[0])
    base = model.init(key(0), x[0])["params"]
    variables = adapted.attach(base, key(1))

    def loss(variables, batch, rngs):
        x, wanted = batch
        y = adapted.apply(variables, x, rngs=rngs)
        return jnp.sum((y - wanted) ** 2) / 2, jnp.ones(()), {}

    found = lora_ga_init(adapted, variables, loss, zip(x, wanted, strict=True))
    assert_close(adapted.apply(found, x), model.apply({"params": base}, x))
    error = np.asarray(x @ base["kernel"] - wanted, np.float64)
    gradient = np.einsum("bti,bto->io", np.asarray(x, np.float64), error)
    u, _, vt = np.linalg.svd(gradient)
    c, lora = 6**0.25 / 4, found["lora"]
    # Singular vectors have no sign of their own.
    np.testing.assert_allclose(abs(lora["lora_a"]), abs(c * u[:, :2]), atol=1e-5)
    np.testing.assert_allclose(abs(lora["lora_b"]), abs(c * vt[2:4]), atol=1e-5)
    start = {"start_a": lora["lora_a"], "start_b": lora["lora_b"]}
    assert_same_tree(found["fixed"], start)
    assert_same_tree(found["frozen"], variables["frozen"])


def test_lora_ga_needs_its_config_batches_and_finite_gradients():
    x, model = normal((3, 5)), nn.Dense(6)
    config = LoRAConfig(rank=2, init="lora_ga", targets=".*")
    adapted = adapt(model, config, x)
    variables = adapted.attach(model.init(key(0), x)["params"], key(1))

    def loss(variables, batch, rngs):
        return jnp.sum(adapted.apply(variables, batch, rngs=rngs)), jnp.ones(()), {}

    with pytest.raises(ValueError, match="at least one batch; got none"):
        lora_ga_init(adapted, variables, loss, [])
    with pytest.raises(ValueError, match="must be finite; kernel have NaN"):
        lora_ga_init(adapted, variables, loss, [x * jnp.nan])
    other = adapt(model, dataclasses.replace(config, init="uniform"), x)
    with pytest.raises(ValueError, match="init='lora_ga'; got init='uniform'"):
        lora_ga_init(other, variables, loss, [x])


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((3, 4), name="wide")(x)
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(jnp.tanh(x))


def eva_case(**fields):
    x = normal((2, 3, 9, 7)) * 2.0 ** jnp.arange(7) / 9  # batches of [b, t, i]
    ranks = {"wide": 3, "out": 1}
    config = LoRAConfig(rank_pattern=ranks, alpha=3, init="eva", rslora=True, **fields)
    adapted = adapt(TwoLayers(), config, x[0])
    base = TwoLayers().init(key(0), x[0])["params"]

    def loss(variables, batch, rngs):
        y = adapted.apply(variables, batch["x"], rngs=rngs)
        return jnp.sum(y**2), jnp.ones(()), {}

    batches = [{"x": part, "mask": normal(part.shape[:2], seed=4) > -1} for part in x]
    return adapted, base, loss, batches


def test_eva_takes_principal_components_and_moves_ranks():
    adapted, base, loss, batches = eva_case(dora=True)
    variables = adapted.attach(base, key(1))
    made, found = eva_init(
        adapted, variables, loss, batches, mask=lambda batch: batch["mask"]
    )
    inputs, ratios, rows = {"wide": [], "out": []}, {}, {}
    for batch in batches:
        x = np.asarray(batch["x"], np.float64)
        hidden = np.einsum("bti,inh->btnh", x, base["wide"]["kernel"])
        hidden = np.tanh(hidden + base["wide"]["bias"]).reshape(*x.shape[:2], -1)
        for name, value in (("wide", x), ("out", hidden)):
            inputs[name].append(value[np.asarray(batch["mask"])])
    for name, parts in inputs.items():
        stacked = np.concatenate(parts)
        _, s, vt = np.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
        most = {"wide": 6, "out": 2}[name]  # rho = 2 times the rank
        ratios[name], rows[name] = (s**2 / (s**2).sum())[:most], vt
    order = sorted((-r, name) for name, own in ratios.items() for r in own)[:4]
    ranks = {name: [n for _, n in order].count(name) for name in inputs}
    assert ranks != {"wide": 3, "out": 1}  # they did move
    for target in made.targets(base):
        assert target.rank == ranks[target.path]
        given = {"wide": 3, "out": 1}[target.path]
        assert target.scaling == pytest.approx(3 / given**0.5)
        a = np.asarray(found["lora"][target.path]["lora_a"]).reshape(-1, target.rank)
        wanted = rows[target.path][: target.rank].T
        np.testing.assert_allclose(abs(a), abs(wanted), atol=1e-4)  # of either sign
    x = batches[0]["x"]
    assert_close(made.apply(found, x), TwoLayers().apply({"params": base}, x))
    kept, same = eva_init(adapted, variables, loss, batches, rho=1.0)
    assert [row.rank for row in kept.targets(base)] == [3, 1]
    assert kept.config.init == "eva"
    assert same["lora"]["wide"]["lora_a"].shape == (7, 3)


def test_eva_refuses_what_it_can_not_observe():
    adapted, base, loss, batches = eva_case()
    variables = adapted.attach(base, key(1))
    for given, options, why in (
        ([], {}, "at least one batch; got none"),
        (batches, {"rho": 0.5}, "rho be at least 1; got init='eva', rho=0.5"),
        ([{"x": batches[0]["x"] * jnp.nan}], {}, "wide has NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=why):
            eva_init(adapted, variables, loss, given, **options)
    case, scanned, base, fresh, _ = attached("scanned_axis_1", "pissa with dora")
    config = dataclasses.replace(scanned.config, init="eva", dora=False)
    scanned = adapt(case.model, config, *case.args)
    with pytest.raises(ValueError, match=r"aren\'t stacked.*is stacked"):
        eva_init(scanned, fresh, loss, batches)
