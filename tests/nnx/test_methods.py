"""Methods other than LoRA on NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import LoRAConfig
from lora_jax.interop.peft import read_peft
from lora_jax.nnx import (
    Trained,
    adapt,
    export_adapter,
    functional,
    load_adapter,
    lora_targets,
    merge,
    save_adapter,
    update,
)
from lora_jax.ops.vera import vera_factors
from tests.reference import assert_close


def test_pissa_starts_silent_merges_and_survives_files(tmp_path):
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), jnp.tanh)
    x = jax.random.normal(jax.random.key(2), (4, 5))
    config = LoRAConfig(rank=2, alpha=3, init="pissa", dora=True)
    adapted = adapt(model, config, rngs=nnx.Rngs(1))
    assert_close(adapted(x), model(x))
    trained = functional(adapted)[1]
    assert sorted(trained) == ["fixed", "frozen", "lora"]
    assert len(jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))) == 3
    trained["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, trained["lora"])
    update(adapted, trained)
    got = adapted(x)
    assert abs(got - model(x)).max() > 1e-3
    assert_close(merge(adapted)(x), got)
    save_adapter(tmp_path / "ours", adapted)
    np.testing.assert_array_equal(load_adapter(tmp_path / "ours", model)(x), got)
    (factors,) = read_peft(export_adapter(tmp_path / "peft", adapted)).modules.values()
    (target,) = lora_targets(adapted)
    assert factors.rank == 2 * target.rank
    assert factors.scaling == target.scaling


def test_vera_is_that_of_the_linen_side_and_survives_files(tmp_path):
    model = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    config = LoRAConfig(rank=3, alpha=2, vera=True, vera_seed=4, targets=".*")
    adapted = adapt(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(adapted(x), model(x))
    trained = functional(adapted)[1]
    drawn = vera_factors((5, 6), 3, seed=4)
    np.testing.assert_array_equal(trained["fixed"]["lora_b"], drawn.lora_b)
    assert sorted(trained["lora"]) == ["vera_b", "vera_d"]
    assert len(jax.tree.leaves(nnx.state(adapted, Trained))) == 2
    trained["lora"] = jax.tree.map(lambda leaf: leaf + 0.2, trained["lora"])
    update(adapted, trained)
    own = 2 / 3 * drawn.lora_a @ (0.3 * drawn.lora_b * 0.2)
    assert_close(adapted(x), model(x) + x @ own)
    assert_close(merge(adapted)(x), adapted(x))
    save_adapter(tmp_path, adapted)
    np.testing.assert_array_equal(load_adapter(tmp_path, model)(x), adapted(x))


def test_lora_ga_is_not_for_nnx():
    config = LoRAConfig(rank=2, init="lora_ga", targets=".*")
    with pytest.raises(ValueError, match="must not be 'lora_ga' for an NNX model"):
        adapt(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
