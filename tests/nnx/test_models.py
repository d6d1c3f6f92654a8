"""The laws, on NNX models that other people might have written."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax.nnx as lnnx
from lora_jax import LoRAConfig
from tests.nnx.models import CASES, build, forward, train_a_little
from tests.reference import assert_close

by_model = pytest.mark.parametrize("name", CASES)


def config_of(name):
    return LoRAConfig(rank=2, alpha=6, targets=CASES[name].targets)


@functools.cache
def built(name, dtype=jnp.float32):
    """A model, its output, and the same model adapted, with one compilation each."""
    model, x = build(name, dtype), CASES[name].inputs
    x = x.astype(dtype) if x.dtype == jnp.float32 else x
    run = forward(model)
    adapted = lnnx.adapt(model, config_of(name), rngs=nnx.Rngs(1))
    return SimpleNamespace(
        model=model,
        adapted=adapted,
        trained=train_a_little(adapted),
        run=run,
        run_adapted=forward(adapted),
        y=run(nnx.state(model), x),
        x=x,
    )


@by_model
@pytest.mark.optimized
def test_a_fresh_adapter_is_silent_to_the_bit(name):
    b = built(name)
    np.testing.assert_array_equal(b.run_adapted(nnx.state(b.adapted), b.x), b.y)


@pytest.mark.optimized
def test_a_bfloat16_base_stays_bfloat16_and_silent():
    b = built("containers", jnp.bfloat16)
    y = b.run_adapted(nnx.state(b.adapted), b.x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, b.y)
    y = b.run_adapted(nnx.state(b.trained), b.x)
    assert y.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(nnx.state(b.trained, lnnx.Trained))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


@by_model
@pytest.mark.optimized
def test_merging_keeps_the_output_and_unmerging_the_base(name):
    b = built(name)
    y = b.run_adapted(nnx.state(b.trained), b.x)
    assert np.abs(y - b.y).max() > 1e-3
    merged = lnnx.merge(b.trained)
    assert nnx.graphdef(merged) == nnx.graphdef(b.model)
    assert_close(b.run(nnx.state(merged), b.x), y)
    back = lnnx.unmerge(merged, b.trained)
    assert leaves_of(back) == leaves_of(b.model)


def leaves_of(model):
    """The arrays themselves: what is equal here was not copied."""
    return {p: id(leaf[...]) for p, leaf in nnx.to_flat_state(nnx.state(model))}


@by_model
def test_the_base_is_shared_and_every_named_layer_adapted(name):
    b = built(name)
    base, own = (variables_of(model) for model in (b.model, b.adapted))
    assert all(own.pop(path) is leaf for path, leaf in base.items())
    assert {path[-1] for path in own} == {"lora_a", "lora_b"}
    targets = lnnx.lora_targets(b.adapted)
    assert len(own) == 2 * len(targets) == 2 * CASES[name].count
    assert targets == lnnx.find_targets(b.model, config_of(name))
    assert nnx.graphdef(b.model) == nnx.graphdef(build(name))


@by_model
def test_a_step_makes_no_gradient_of_the_base(name):
    b = built(name)
    graphdef, trained, frozen = nnx.split(b.trained, lnnx.Trained, ...)

    def loss(trained, frozen):
        model = nnx.merge(graphdef, trained, frozen, copy=True)
        return jnp.sum(jnp.square(model(b.x)))

    step = jax.jit(jax.grad(loss)).lower(trained, frozen)
    made = {line.rpartition("-> tensor<")[2] for line in products(step.as_text())}
    kernels = {t.kernel_shape for t in lnnx.lora_targets(b.trained)}
    assert made
    assert made.isdisjoint({f"{'x'.join(map(str, k))}xf32>" for k in kernels})


def variables_of(model):
    leaves = nnx.iter_graph(model)
    return {path: leaf for path, leaf in leaves if isinstance(leaf, nnx.Variable)}


def products(text):
    kinds = ("stablehlo.dot_general", "stablehlo.convolution")
    return [line for line in text.splitlines() if any(kind in line for kind in kinds)]
