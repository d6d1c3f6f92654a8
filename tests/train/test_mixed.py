"""Mixed batches: each adapter's step is that of its own rows, and no other moves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.nn.adapt import adapt
from lora_jax.nn.rows import RowAdapted
from lora_jax.train.members import Hyper
from lora_jax.train.mixed import (
    evaluate_each,
    make_mixed_eval_step,
    make_mixed_step,
    mixed_state,
)
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step

OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5}
STEPS, WARMUP = (6, 3, 9, 4), (2, 1, 0, 1)
# Of the rows: the second adapter has none in the first batch, the fourth in the second.
IDS = ([2, 0, 2, 3, 0, 2], [1, 0, 1, 2, 0, 1], [3, 3, 3, 0, 3, 3])


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = jnp.tanh(nn.Dense(5, name="up")(x))
        return nn.Dense(2, name="head")(x)


def loss_of(module):
    def loss_fn(variables, batch, rngs):
        y = module.apply(variables, batch["x"], deterministic=not rngs, rngs=rngs)
        each = jnp.sum(jnp.square(y - batch["y"]), axis=-1)
        weights = batch["weights"]
        return jnp.sum(weights * each), jnp.sum(weights), {"most": jnp.sum(y[..., 0])}

    return loss_fn


def batch_of(number, seed=0):
    rng = np.random.default_rng([seed, number])
    x, y = rng.standard_normal((6, 3, 4)), rng.standard_normal((6, 3, 2))
    weights = rng.integers(0, 3, (6, 3)) * 1.0
    arrays = {"x": x, "y": y, "weights": weights}
    return {k: v.astype("f4") for k, v in arrays.items()}


@pytest.fixture(scope="module")
def adapted():
    config = LoRAConfig(rank=2, alpha=3, targets=["up"], train=("head",))
    return adapt(Model(), config, jnp.ones((1, 4)))


@pytest.fixture(scope="module")
def variables(adapted):
    params = Model().init(jax.random.key(1), jnp.ones((1, 4)))["params"]
    found = adapted.attach(params, jax.random.key(2))
    b = found["lora"]["up"]["lora_b"]
    found["lora"]["up"]["lora_b"] = 0.3 + b
    return found


def batch_arrays(batch):
    return {k: jnp.asarray(v) for k, v in batch.items() if k != "adapter"}


def hypers():
    one = Hyper.of([], total_steps=1, **OPTIONS)
    every = jax.tree.map(lambda x: np.full(len(STEPS), x), one)
    return every._replace(total_steps=np.int32(STEPS), warmup_steps=np.int32(WARMUP))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_adapter_takes_the_steps_of_its_own_rows(adapted, variables, accumulate):
    step = make_mixed_step(loss_of(RowAdapted(adapted)), hypers(), accumulate)
    state = mixed_state(variables, hypers(), jax.random.key(0))
    alone = []
    for total, warmup in zip(STEPS, WARMUP, strict=True):
        tx = lora_optimizer(total_steps=total, warmup_steps=warmup, **OPTIONS)
        own = TrainState.create(variables, tx, jax.random.key(0))
        alone.append([make_train_step(loss_of(adapted), tx), own])
    for number, ids in enumerate(IDS):
        batch, ids = batch_of(number), np.int32(ids)
        before = jax.device_get((state.trainable, state.opt_state))
        state, metrics = step(state, {**batch, "adapter": ids})
        assert not metrics["is_skipped"]
        after = jax.device_get((state.trainable, state.opt_state))
        for adapter in range(len(STEPS)):
            if adapter in ids:
                rows = {key: leaf[ids == adapter] for key, leaf in batch.items()}
                train, own = alone[adapter]
                alone[adapter][1], _ = train(own, rows)
            else:  # to the bit: no decay, no moment, no count
                jax.tree.map(
                    lambda x, y, i=adapter: np.testing.assert_array_equal(x[i], y[i]),
                    before,
                    after,
                )
    for adapter, (_, own) in enumerate(alone):
        wanted = jax.tree.leaves((own.trainable, own.opt_state))
        found = jax.tree.leaves((state.trainable, state.opt_state))
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours[adapter], theirs, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 3


def test_filler_and_a_row_that_is_not_finite_move_nobody_else(adapted, variables):
    step = make_mixed_step(loss_of(RowAdapted(adapted)), hypers())
    state = mixed_state(variables, hypers(), jax.random.key(0))
    batch, ids = batch_of(0), np.int32([0, 1, 1, 2, 3, 3])
    batch["weights"][0] = 0  # the only row of the first adapter is filler
    batch["y"][3] = np.inf
    before = jax.device_get((state.trainable, state.opt_state))
    state, metrics = step(state, {**batch, "adapter": ids})
    assert metrics["is_skipped"] == state.skipped == 1
    after = jax.device_get((state.trainable, state.opt_state))
    moved = [
        any(
            (x[i] != y[i]).any()
            for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True)
        )
        for i in range(4)
    ]
    assert moved == [False, True, False, True]


def test_thousands_of_adapters_cost_what_the_rows_of_a_batch_cost(adapted, variables):
    def flops(count):
        every = jax.tree.map(lambda x: np.resize(x, count), hypers())
        step = make_mixed_step(loss_of(RowAdapted(adapted)), every)
        state = jax.eval_shape(
            lambda v, k: mixed_state(v, every, k), variables, jax.random.key(0)
        )
        batch = {**batch_of(0), "adapter": np.zeros(6, np.int32)}
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    assert flops(5000) < 1.1 * flops(8)


def test_each_adapter_is_evaluated_on_its_own_rows(adapted, variables):
    state = mixed_state(variables, hypers(), jax.random.key(0))
    scale = jnp.arange(1.0, 5.0)
    own = jax.tree.map(
        lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), state.trainable
    )
    batches = [
        {**batch_of(n), "adapter": np.int32(ids)} for n, ids in enumerate(IDS[:2])
    ]
    found = evaluate_each(
        make_mixed_eval_step(loss_of(adapted)), own, state.frozen, batches, 4
    )
    for adapter in range(4):
        one = {**state.frozen, **jax.tree.map(lambda x, i=adapter: x[i], own)}
        sums = np.zeros(2)
        for batch in batches:
            rows = batch["adapter"] == adapter
            if rows.any():
                part = {k: v[rows] for k, v in batch_arrays(batch).items()}
                sums += np.array(loss_of(adapted)(one, part, {})[:2])
        np.testing.assert_allclose(found["loss"][adapter], sums[0] / sums[1], rtol=1e-5)
        assert found["weight"][adapter] == sums[1]
