"""Many runs in one step: the base is read once, and each run is as it is alone."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.nn.adapt import adapt
from lora_jax.train.members import Hyper, member_optimizer, shared_adapter
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.slots import Members
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step

M, ROWS, TOKENS, IN, OUT = 3, 5, 7, 24, 40


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(OUT, name="up")(x))
        return nn.Dense(IN, name="down")(x)


def adapted_and_loss(config):
    model = adapt(Model(), config, jnp.ones((1, IN)))

    def loss_fn(variables, batch, rngs):
        y = model.apply(variables, batch["x"], rngs=rngs)
        return jnp.sum(jnp.square(y - batch["y"])), jnp.float32(y.size), {}

    return model, loss_fn


def batches(count):
    x, y = np.random.default_rng(0).standard_normal((2, count, ROWS, TOKENS, IN))
    return [{"x": x[i].astype("f4"), "y": y[i].astype("f4")} for i in range(count)]


@pytest.fixture(scope="module")
def params():
    return Model().init(jax.random.key(0), jnp.ones((1, IN)))["params"]


OPTIONS = {"total_steps": 6, "warmup_steps": 2}
RUNS = [
    (dict(rank=2, alpha=3), dict(learning_rate=1e-2)),
    (dict(rank=4, alpha=5, rslora=True), dict(learning_rate=1e-3, schedule="cosine")),
    (
        dict(rank=3, alpha=1),
        dict(learning_rate=3e-3, lora_b_ratio=4, weight_decay=0.1, clip_norm=None),
    ),
]


def make_members(params, runs, own_rate=None, **own):
    shared, loss_fn = adapted_and_loss(LoRAConfig(rank=4, alpha=4, **own))
    targets = shared.targets(params)
    variables = shared.attach(params, jax.random.key(9))
    hyper = Hyper.of(targets, learning_rate=1.0, **OPTIONS, dropout_rate=own_rate)
    hyper = hyper._replace(fixed=variables.get("fixed"))
    state = TrainState.create(variables, member_optimizer(hyper), jax.random.key(9))
    return Members(loss_fn, 1, state, hyper, len(runs)), targets


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ({}, (0.25, 0.0, 0.6)),
        ({"dora": True}, (0.25, 0.25, 0.25)),
        ({"vera": True}, (0.25, 0.0, 0.6)),
    ],
    ids=["lora", "dora", "vera"],
)
def test_members_train_as_they_do_alone(params, method, rates):
    is_apart = len({*rates}) > 1
    shared = {**method, "dropout_rate": 0.0 if is_apart else rates[0]}
    members, targets = make_members(
        params, RUNS, own_rate=0.5 if is_apart else None, **shared
    )
    alone = []
    for slot, (lora, options) in enumerate(RUNS):
        if "vera" in method:
            options = {k: v for k, v in options.items() if k != "lora_b_ratio"}
        model, loss_fn = adapted_and_loss(
            LoRAConfig(**lora, **method, dropout_rate=rates[slot])
        )
        tx = lora_optimizer(**options, **OPTIONS)
        variables = model.attach(params, jax.random.key(slot))
        state = TrainState.create(variables, tx, jax.random.key(slot))
        own = {"dropout_rate": rates[slot]} if is_apart else {}
        hyper = Hyper.of(model.targets(params), **options, **OPTIONS, **own)
        hyper = hyper._replace(fixed=variables.get("fixed"))
        members.put(slot, state, hyper)
        alone.append((make_train_step(loss_fn, tx), state, hyper))
    data = batches(M)
    likes = [jax.tree.map(jnp.copy, state) for _, state, _ in alone]
    for number in range(4):
        # The second run sits out a step, as runs with batches of another length do.
        chosen = [0, 2] if number == 1 else [0, 1, 2]
        metrics = members.step({slot: data[slot] for slot in chosen})
        for slot in chosen:
            step, state, hyper = alone[slot]
            state, own = step(state, data[slot])
            alone[slot] = (step, state, hyper)
            for name, value in own.items():
                np.testing.assert_allclose(metrics[slot][name], value, rtol=1e-5)
    assert members.update._cache_size() == 1
    for slot, (_, state, hyper) in enumerate(alone):
        found = members.get(slot, likes[slot])
        assert int(found.step) == int(state.step) == (3 if slot == 1 else 4)
        for ours, theirs in zip(
            jax.tree.leaves(found.changing),
            jax.tree.leaves(state.changing),
            strict=True,
        ):
            if jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key):
                ours, theirs = (jax.random.key_data(key) for key in (ours, theirs))
            atol = 1e-5 * float(jnp.abs(theirs.astype(jnp.float32)).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
        padded = shared_adapter(found.variables, hyper, targets)
        held = "fixed" if "vera" in method else "lora"
        assert padded[held]["up"]["lora_b"].shape == (4, OUT)


@pytest.mark.optimized
def test_the_base_is_read_once_and_has_no_gradient(params):
    def dots(text):
        return re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)

    members, _ = make_members(params, RUNS)
    data = batches(M)
    shapes = members.shapes(
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in data[0].items()}
    )
    compiled = members.trace(members.state, shapes).lower().compile()
    text = compiled.as_text()
    rows = M * ROWS * TOKENS
    found = dots(text)
    # x W0 of both layers, and dy W0ᵀ of the second: each one product of all rows.
    assert found.count(f"{rows},{OUT}") == 2
    assert found.count(f"{rows},{IN}") == 1
    # No dW0, of one member or of all, and no copy of W0 by member.
    sides = ({IN, OUT}, {M, IN, OUT})
    assert not any({int(n) for n in shape.split(",")} in sides for shape in found)
    assert f"f32[{M},{IN},{OUT}]" not in text
    assert f"f32[{M},{OUT},{IN}]" not in text
    alone, _ = make_members(params, RUNS[:1])
    shapes = alone.shapes(
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in data[0].items()}
    )
    one = alone.trace(alone.state, shapes).lower().compile()
    flops = [c.cost_analysis()["flops"] for c in (compiled, one)]
    assert flops[0] < 1.05 * M * flops[1]
