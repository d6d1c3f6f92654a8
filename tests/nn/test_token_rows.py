"""Rows of single tokens are trained in a model that knows nothing of them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, LoRADense, adapt, lora_optimizer
from lora_jax.train.optimizer import decay_mask
from lora_jax.tree.partition import count
from lora_jax.tree.paths import flatten
from tests.nn.tools import equal, key, normal
from tests.reference import assert_close


class Tied(nn.Module):
    """A tied table, a head of its own, and another table."""

    @nn.compact
    def __call__(self, ids):
        words = nn.Embed(11, 6, name="words")
        places = nn.Embed(5, 6, name="places")
        x = words(ids) + places(jnp.arange(ids.shape[1]))
        x = jnp.tanh(nn.Dense(6, name="up")(x))
        return words.attend(x), nn.Dense(7, name="head")(x)


IDS = jnp.array([[3, 7, 1, 7], [0, 3, 9, 2]])
TOKENS = {"words": [7, 3], "head": [5, 0, 2]}
CONFIG = LoRAConfig(rank=2, alpha=3, targets=["up"], tokens=TOKENS)


@functools.cache
def made():
    model = Tied()
    params = jax.jit(model.init)(key(0), IDS)["params"]
    adapted = adapt(model, CONFIG)
    return model, params, adapted, adapted.attach(params, key(1))


def moved(variables):
    """Variables whose rows and B are no longer the start's."""
    rows = {"words": {"token_rows": normal((2, 6))}}
    rows["head"] = {"token_rows": normal((3, 6), 1)}
    up = {**variables["lora"]["up"], "lora_b": normal((2, 6), 9)}
    return {**variables, "params": rows, "lora": {"up": up}}


@pytest.mark.optimized
def test_fresh_rows_change_no_bit():
    model, params, adapted, variables = made()
    rows = flatten(variables["params"])
    assert {path: leaf.shape for path, leaf in rows.items()} == {
        "words/token_rows": (2, 6),
        "head/token_rows": (3, 6),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in rows.values())
    found = jax.jit(adapted.apply)(variables, IDS)
    assert equal(found, jax.jit(model.apply)({"params": params}, IDS))
    assert equal(adapted.detach(variables), params)


def test_merged_rows_compute_the_same_and_unmerge_to_the_bit():
    model, params, adapted, variables = made()
    variables = moved(variables)
    merged = adapted.merge(variables, check=False)
    for found, wanted in zip(
        jax.jit(adapted.apply)(variables, IDS),
        jax.jit(model.apply)({"params": merged}, IDS),
        strict=True,
    ):
        assert_close(found, wanted)
    changed = (merged["words"]["embedding"] != params["words"]["embedding"]).any(1)
    assert np.flatnonzero(changed).tolist() == [3, 7]
    assert equal(adapted.unmerge(merged, variables), params)


def test_gradients_are_those_of_the_merged_table_s_rows():
    model, _, adapted, variables = made()
    variables = moved(variables)
    weights = normal((2, 4, 11), 4), normal((2, 4, 7), 5)

    def loss(outputs):
        return sum(jnp.vdot(w, y) for w, y in zip(weights, outputs, strict=True))

    @jax.jit
    def of_rows(trained):
        return loss(adapted.apply({**variables, "params": trained}, IDS))

    @jax.jit
    def of_all(params):
        return loss(model.apply({"params": params}, IDS))

    found = jax.grad(of_rows)(variables["params"])
    wanted = jax.grad(of_all)(adapted.merge(variables, check=False))
    assert_close(
        found["words"]["token_rows"], wanted["words"]["embedding"][jnp.array([7, 3])]
    )
    own = wanted["head"]["kernel"].T[jnp.array([5, 0, 2])]
    assert_close(found["head"]["token_rows"], own)


def test_only_the_rows_are_trained_and_decay_leaves_them():
    *_, variables = made()
    trained = {name: variables[name] for name in ("lora", "params")}
    assert count(trained) == 2 * (6 + 6) + (2 + 3) * 6
    tx = lora_optimizer(1.0, total_steps=2, weight_decay=0.5)
    state = jax.eval_shape(tx.init, trained)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 3 * 6
    assert not any(jax.tree.leaves(decay_mask(trained)["params"]))


def test_init_makes_the_rows_of_the_table_that_it_draws():
    adapted = adapt(Tied(), CONFIG)
    variables = jax.jit(adapted.init)(key(2), IDS)
    table = variables["frozen"]["words"]["embedding"]
    rows = variables["params"]["words"]["token_rows"]
    assert equal(rows, table[jnp.array([7, 3])])


def test_every_fault_is_in_one_error():
    tokens = {"words": [11, "sky"], "places": [1], "up": [0], "tables": [0]}
    config = LoRAConfig(targets=["up"], train=["places"], tokens=tokens)
    with pytest.raises(ValueError, match="tokens: ") as error:
        adapt(Tied(), config).token_rows(made()[1])
    for part in (
        r"[11] must be below 11, the rows of 'words'",
        "['sky'] must be ids here",
        "'places' must not be in `train` too",
        "'up' must not be among the targets too",
        "'tables' matched 0 of 4 layers. Did you mean: places?",
    ):
        assert part in str(error.value)


def test_a_list_must_say_of_which_table():
    adapted = adapt(Tied(), dataclasses.replace(CONFIG, tokens=[1]))
    _, params, _, variables = made()
    with pytest.raises(ValueError, match=r"with the layer that has the rows, as \{'"):
        adapted.token_rows(params)
    with pytest.raises(ValueError, match="must be given by layer here"):
        adapted.apply(variables, IDS)


def test_missing_rows_are_an_error():
    *_, adapted, variables = made()
    variables = {name: variables[name] for name in ("frozen", "lora")}
    with pytest.raises(ValueError, match="must have 'words/token_rows' for the 2 tok"):
        adapted.apply(variables, IDS)
    with pytest.raises(ValueError, match="head/token_rows is missing; words/token_row"):
        adapted.merge(variables)


def test_a_stacked_table_is_refused():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, ids):
            layer = nn.vmap(
                nn.Embed, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return nn.Dense(2, name="up")(layer(4, 3, name="words")(ids))

    adapted = adapt(Stack(), LoRAConfig(tokens={"words": [1]}), IDS)
    with pytest.raises(
        ValueError, match=r"'words' must be an embedding, or a lin.*2, 4"
    ):
        adapted.token_rows()


def test_lora_layers_and_nnx_refuse_them():
    from flax import nnx

    import lora_jax.nnx as lnnx

    with pytest.raises(ValueError, match="tokens must be empty here"):
        LoRADense(3, lora=CONFIG)
    with pytest.raises(ValueError, match="tokens must be empty here"):
        lnnx.adapt(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
