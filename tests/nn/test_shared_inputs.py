"""Neighbouring layers' ``x A`` at once, as on TPUs and GPUs, against each its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.nn import shared_inputs
from lora_jax.nn.adapt import adapt
from lora_jax.ops import fence
from tests.laws import equations, normal
from tests.reference import assert_close

ROWS, WIDTH = 5, 6


class Attention(nn.Module):
    """Reads ``x`` three times, and in ``output`` another array of the same width."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(WIDTH, name=n)(x) for n in ("query", "key", "value"))
        return nn.Dense(WIDTH, name="output")(jnp.tanh(q * k) + v)


class Model(nn.Module):
    """Gives one of the layers an input of its own if asked to."""

    @nn.compact
    def __call__(self, x):
        x = Attention(name="attention")(x)
        gate, up = nn.Dense(7, name="gate")(x), nn.Dense(7, name="up")(x + 1)
        return jnp.sum(jnp.sin(gate * up))


def gradients(config, monkeypatch, platform):
    monkeypatch.setattr(shared_inputs, "target_platform", lambda: platform)
    model, x = Model(), normal((ROWS, WIDTH), seed=1)
    params = model.init(jax.random.key(0), x)["params"]
    adapted = adapt(model, config, x)
    variables = adapted.attach(params, jax.random.key(1))
    lora = jax.tree.map(lambda leaf: leaf + 0.1, variables["lora"])

    def loss(lora, x):
        options = {"rngs": {"dropout": jax.random.key(2)}}
        return adapted.apply({**variables, "lora": lora}, x, **options)

    function = jax.value_and_grad(loss, (0, 1))
    made = list(equations(jax.make_jaxpr(function)(lora, x)))
    avals = [e.outvars[0].aval for e in made]
    shapes = [aval.shape for aval in avals if hasattr(aval, "shape")]
    return lambda: jax.jit(function)(lora, x), shapes, made


@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("tpu", {"rank": 3, "dora": True}),
        ("gpu", {"rank": 2, "rank_pattern": {"key": 4}}),
    ],
    ids=["dora", "other rank"],
)
def test_the_products_of_neighbours_are_one(platform, options, monkeypatch):
    config = LoRAConfig(alpha=5, targets="all-linear", **options)
    wanted, apart, _ = gradients(config, monkeypatch, "cpu")
    got, shapes, _ = gradients(config, monkeypatch, platform)
    jax.tree.map(assert_close, got(), wanted())
    total = sum(config.rank_for(f"attention/{n}") for n in ("query", "key", "value"))
    assert (ROWS, total) in shapes
    assert (ROWS, total) not in apart


@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("cpu", {}),
        ("tpu", {"dropout_rate": 0.5}),
        ("tpu", {"exclude": ["key", "value"]}),
    ],
    ids=["on a CPU", "with dropout", "alone"],
)
def test_a_layer_computes_its_own_product(platform, options, monkeypatch):
    config = LoRAConfig(rank=3, alpha=5, targets="all-linear", **options)
    _, shapes, _ = gradients(config, monkeypatch, platform)
    assert not {(ROWS, 9), (ROWS, 6, 3)} & set(shapes)


def test_gradients_of_an_own_input_are_added_before_they_are_finished(monkeypatch):
    monkeypatch.setattr(fence, "target_platform", lambda: "tpu")
    monkeypatch.setattr(fence, "MIN_BYTES", 0)
    config = LoRAConfig(rank=3, alpha=5, targets="all-linear")
    *_, made = gradients(config, monkeypatch, "tpu")
    by = {id(var): e.primitive.name for e in made for var in e.outvars}
    finished = [
        by.get(id(e.invars[0]))
        for e in made
        if e.primitive.name == "optimization_barrier"
    ]
    assert finished.count("add_any") == 1  # of `output`
    assert finished.count("dot_general") == 5
