"""Training: the library's own step, flax's optimizer, tunix's contract; both APIs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
import lora_jax.nnx as lnnx
from experiments.one_layer.run import fit as fit_functions
from experiments.one_layer.run import fit_nnx, make_task
from lora_jax import LoRAConfig, TrainState, fit, lora_optimizer, make_train_step
from lora_jax.files.checkpoint import Checkpoints
from tests.nnx.models import build

CONFIG = LoRAConfig(rank=2, alpha=6, targets=["embed", "query", "up"], train=["head"])
STEPS = 20


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.head = nnx.Linear(12, 11, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        return self.head(nnx.gelu(self.up(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embed")(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(11, name="head")(nn.gelu(nn.Dense(12, name="up")(x)))


BATCH = {
    "ids": jnp.arange(20).reshape(4, 5) % 11,
    "labels": jnp.arange(20).reshape(4, 5) % 7,
}


def loss_of(logits, batch):
    return lora_jax.softmax_cross_entropy(logits, batch["labels"])


def loss_fn_of(module):
    def loss_fn(variables, batch, rngs):
        logits = module.apply(variables, batch["ids"], rngs=rngs)
        return *loss_of(logits, batch), {}

    return loss_fn


def optimizer():
    return lora_optimizer(1e-2, total_steps=STEPS, weight_decay=0.1, lora_b_ratio=2.0)


def trained(module, variables):
    step = make_train_step(loss_fn_of(module), optimizer())
    state = TrainState.create(variables, optimizer(), jax.random.key(2))
    compiled, losses = step.lower(state, BATCH).compile(), []
    for _ in range(STEPS):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert step.update._cache_size() == 1
    return losses, state, compiled


@pytest.fixture(scope="module")
def of_nnx():
    model = lnnx.adapt(Model(), CONFIG, rngs=nnx.Rngs(1))
    return trained(*lnnx.functional(model))


def test_both_apis_train_alike_and_cost_the_same(of_nnx):
    params = nnx.to_pure_dict(nnx.state(Model()))
    adapted = lora_jax.adapt(LinenModel(), CONFIG, BATCH["ids"])
    variables = adapted.attach(params, jax.random.key(1))
    losses, state, compiled = trained(adapted, variables)
    np.testing.assert_allclose(of_nnx[0], losses, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.3
    wanted, got = (lora_jax.tree.paths.flatten(s.trainable) for s in (state, of_nnx[1]))
    assert wanted.keys() == got.keys()
    for path in wanted:
        np.testing.assert_allclose(got[path], wanted[path], rtol=1e-4, atol=1e-6)
    costs = [c.cost_analysis()["flops"] for c in (compiled, of_nnx[2])]
    assert costs[1] <= costs[0] * 1.03  # flax computes attention in two ways


def test_the_step_leaves_the_base_alone_and_its_result_goes_back_into_the_model(of_nnx):
    model = lnnx.adapt(Model(), CONFIG, rngs=nnx.Rngs(1))
    module, before = lnnx.functional(model)
    state = of_nnx[1]
    jax.tree.map(
        np.testing.assert_array_equal, state.frozen["frozen"], before["frozen"]
    )
    lnnx.update(model, state.variables)
    wanted = jax.jit(module.apply)(state.variables, BATCH["ids"])
    np.testing.assert_allclose(model(BATCH["ids"]), wanted, rtol=1e-6, atol=1e-6)
    wrong = {"lora": {"up": {"lora_a": jnp.ones((3, 2))}}, "params": {"x": 1}}
    with pytest.raises(
        ValueError,
        match=r"lora/embed/lora_b is missing.*params/x is not in.*must be \(8, 2\)",
    ):
        lnnx.update(model, wrong)


@pytest.mark.parametrize("wrt", [lnnx.Trained, nnx.LoRAParam], ids=["ours", "tunix"])
def test_an_ordinary_loop_of_flax_trains_alike(of_nnx, wrt):
    """With `flax.nnx.LoRAParam` it is the contract of tunix's `PeftTrainer`."""
    base = Model()
    model = lnnx.adapt(base, CONFIG, rngs=nnx.Rngs(1))
    assert any(isinstance(leaf, nnx.LoRAParam) for _, leaf in nnx.iter_graph(model))
    tx = nnx.Optimizer(model, optimizer(), wrt=wrt)

    @nnx.jit
    def step(model, tx, batch):
        def loss_fn(model):
            loss, weight = loss_of(model(batch["ids"]), batch)
            return loss / weight

        diff = nnx.DiffState(0, wrt)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=diff)(model)
        tx.update(model, grads)
        return loss

    losses = [float(step(model, tx, BATCH)) for _ in range(STEPS)]
    np.testing.assert_allclose(losses, of_nnx[0], rtol=1e-5)
    assert model.attention.key.kernel is base.attention.key.kernel
    leaves = jax.tree.leaves(tx.opt_state)
    sizes = sum(x.size for x in jax.tree.leaves(nnx.state(model, lnnx.Trained)))
    assert sum(x.size for x in leaves if x.ndim) == 2 * sizes  # Adam's moments


def test_an_optimizer_of_all_params_is_told_that_it_would_train_the_base():
    model = lnnx.adapt(Model(), CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"train 11 weights of the base.*wrt=lora_jax"):
        nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    full = lora_optimizer(1e-2, total_steps=STEPS)
    nnx.Optimizer(Model(), full, wrt=nnx.Param)  # without adapters there is no mistake


def test_a_gradient_of_the_base_is_refused_whatever_the_optimizer():
    x = jnp.ones((4, 6))
    base = build("scanned")
    model = lnnx.adapt(base, LoRAConfig(rank=2, alpha=6), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss_fn(model):
        return jnp.sum(jnp.square(model(x)))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))  # by default of nnx.Param

    message = r"gradient of Linear.kernel.*the base would be.*wrt=lora_jax.nnx.Trained"
    with pytest.raises(ValueError, match=message):
        step(model, optimizer)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True)))(params)
    nnx.grad(loss_fn)(base)  # without adapters there is no mistake
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, lnnx.Trained))(model)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"lora_a", "lora_b"}


def test_a_kernel_that_is_trained_beside_its_adapter_has_a_gradient():
    layer, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    config = LoRAConfig(rank=2, targets=".*", train=["kernel"])
    model = lnnx.adapt(layer, config, rngs=nnx.Rngs(1))
    diff = nnx.DiffState(0, lnnx.Trained)
    grads = nnx.grad(lambda model: model(x).sum(), argnums=diff)(model)
    np.testing.assert_array_equal(grads["kernel"][...], 2 * jnp.ones((3, 4)))


def test_tree_mode_differentiates_the_trained_half():
    model = lnnx.adapt(Model(), CONFIG, rngs=nnx.Rngs(1))
    graphdef, trained, frozen = nnx.split(model, lnnx.Trained, ..., graph=False)

    @jax.jit
    def gradients(trained, frozen):
        def loss(trained):
            logits = nnx.merge(graphdef, trained, frozen)(BATCH["ids"])
            return loss_of(logits, BATCH)[0]

        return jax.grad(loss)(trained)

    grads = gradients(trained, frozen)
    norms = {p: float(optax.tree.norm(g)) for p, g in nnx.to_flat_state(grads)}
    assert {p[-1] for p, norm in norms.items() if norm == 0} == {"lora_a", "lora_b"}
    assert norms["embed", "lora_a"] > 0  # of an embedding A is zero, so B has none
    assert norms["embed", "lora_b"] == norms["up", "lora_a"] == 0


def test_fit_and_checkpoints_take_an_nnx_model(tmp_path):
    model = lnnx.adapt(Model(), CONFIG, rngs=nnx.Rngs(1))
    module, variables = lnnx.functional(model)
    step = make_train_step(loss_fn_of(module), optimizer(), accumulate=2)
    start = TrainState.create(variables, optimizer(), jax.random.key(2))
    mark = lora_jax.fingerprint(variables["frozen"])
    with Checkpoints(tmp_path, config=CONFIG.to_dict(), fingerprint=mark) as saved:
        end = fit(start, step, lambda _: BATCH, total_steps=2, every=[(1, saved.save)])
        saved.wait()
        again = TrainState.create(variables, optimizer(), jax.random.key(2))
        middle = saved.restore(again, step=1)
    rest = fit(middle, step, lambda _: BATCH, total_steps=2)
    jax.tree.map(
        np.testing.assert_array_equal, rest.state.trainable, end.state.trainable
    )


def test_streams_are_seeded_for_each_path_and_off_without_a_key():
    config = LoRAConfig(rank=2, alpha=6, dropout_rate=0.5)
    model = lnnx.adapt(build("scanned"), config, rngs=nnx.Rngs(1))
    model.train()
    module, variables = lnnx.functional(model)
    filled = jax.tree.map(lambda x: x + 1, variables["lora"])
    variables = {**variables, "lora": filled}
    x = jnp.ones((4, 6))
    run = jax.jit(lambda key: module.apply(variables, x, rngs={"dropout": key}))
    one, two = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(one - two).max() > 0
    np.testing.assert_array_equal(one, run(jax.random.key(0)))
    keys = module.bind(variables, rngs={"dropout": jax.random.key(0)}).blocks
    up, down = (s.lora_rngs.key[...] for s in (keys.up, keys.down))
    assert up.shape == (3,)
    assert len({*map(str, jax.random.key_data(jnp.concatenate([up, down])))}) == 6
    quiet = jax.jit(lambda: module.apply(variables, x))
    np.testing.assert_array_equal(quiet(), quiet())


def test_the_one_layer_experiment_trains_alike_in_both_apis():
    x, kernel, target = make_task(jax.random.key(42))
    key, rate = jax.random.key(0), 1e-2
    fields = {"rank": 3, "steps": 30}
    one, two = (
        run(kernel, x, target, key, 6.0, rate, **fields)
        for run in (fit_functions, fit_nnx)
    )
    np.testing.assert_allclose(two[1], one[1], rtol=1e-6)
    assert one[1][-1] < 0.7 * one[1][0]
