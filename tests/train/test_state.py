"""TrainState: trainable and frozen leaves, and invalid variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.train.state import TrainState


def make_variables():
    return {
        "frozen": {"kernel": np.ones((3, 2), np.float32)},
        "batch_stats": {"mean": jnp.ones(2)},
        "lora": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))},
    }


def create(variables, tx=None):
    return TrainState.create(variables, tx or optax.adam(0.1), jax.random.key(0))


def test_variables_undo_the_split_of_create():
    variables = make_variables()
    state = create(variables)
    assert sorted(state.trainable) == ["lora"]
    assert sorted(state.frozen) == ["batch_stats", "frozen"]
    assert jax.tree.structure(state.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, state.variables, variables)
    assert "frozen" not in state.changing


def test_optimizer_state_exists_only_for_trainable_leaves():
    state = create(make_variables())
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * 5


def test_trainable_leaves_are_copied_and_frozen_ones_are_not():
    variables = make_variables() | {"frozen": {"kernel": jnp.ones((3, 2))}}
    state = create(variables)
    assert state.frozen["frozen"]["kernel"] is variables["frozen"]["kernel"]
    a, b = state.trainable["lora"]["lora_a"], variables["lora"]["lora_a"]
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="leaves in 'lora' or 'params'"):
        create({"frozen": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"got \{'lora': 0, 'params': 0\} leaves"):
        create({"lora": {}, "params": {}})


def test_all_trainable_leaves_that_are_not_floating_are_listed():
    variables = make_variables() | {
        "params": {"ids": jnp.arange(3), "mask": jnp.ones(2, bool), "ok": jnp.ones(1)}
    }
    with pytest.raises(
        TypeError,
        match=r"got 2 that are not: params/ids \(int32\), params/mask \(bool\)",
    ):
        create(variables)
