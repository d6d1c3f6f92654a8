"""tunix's own trainer, on a model that was adapted here; see the extra ``tunix``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax.nnx as lnnx
from tests.nnx.test_training import BATCH, CONFIG, Model, loss_of

STEPS = 4


@pytest.fixture(scope="module")
def trainer_module():
    return pytest.importorskip(
        "tunix.sft.peft_trainer", reason="needs google-tunix, of the extra `tunix`"
    )


def mean_loss(model, ids, labels):
    total, weight = loss_of(model(ids), {"labels": labels})
    return total / weight


@pytest.mark.filterwarnings("ignore")  # tunix's dependencies, not ours
def test_tunix_trains_the_adapters_as_an_ordinary_loop_does(trainer_module):
    base = Model()
    ours, theirs = (lnnx.adapt(base, CONFIG, rngs=nnx.Rngs(1)) for _ in range(2))
    frozen = jax.tree.map(jnp.copy, nnx.state(base, nnx.Param))
    settings = trainer_module.TrainingConfig(
        eval_every_n_steps=STEPS, max_steps=STEPS, data_sharding_axis=()
    )
    trainer = trainer_module.PeftTrainer(theirs, optax.adam(1e-2), settings)
    trainer.with_loss_fn(mean_loss).with_gen_model_input_fn(dict)
    mesh = jax.make_mesh((1,), ("fsdp",))
    with mesh:
        trainer.train([BATCH] * STEPS)

    optimizer = nnx.Optimizer(ours, optax.adam(1e-2), wrt=lnnx.Trained)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(mean_loss, argnums=nnx.DiffState(0, lnnx.Trained))(
            model, **BATCH
        )
        optimizer.update(model, grads)

    start = nnx.state(lnnx.adapt(base, CONFIG, rngs=nnx.Rngs(1)), lnnx.Trained)
    for _ in range(STEPS):
        step(ours, optimizer)
    got, wanted = (nnx.state(model, lnnx.Trained) for model in (theirs, ours))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, wanted, start)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(base, nnx.Param), frozen)
