"""The loss of pairs, on a toy and on a model as it is loaded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import (
    LoRAConfig,
    TrainState,
    contrastive,
    embedding_loss,
    load_model,
    make_train_step,
)
from tests.models.golden import GOLDEN


class Pairs(nn.Module):
    def setup(self):
        self.table, self.other = nn.Embed(9, 4), nn.Dense(4)
        self.drop = nn.Dropout(0.5)

    def __call__(self, ids):
        return self.first(ids) + self.second(ids)

    def first(self, ids, *, deterministic=True):
        return self.drop(self.table(ids), deterministic=deterministic)

    def second(self, ids, *, deterministic=True):
        return self.other(self.table(ids))


def test_it_is_the_contrastive_loss_of_both_methods_and_counts_hits():
    model, ids = Pairs(), jnp.array([1, 4, 7])
    variables = model.init(jax.random.key(0), ids)
    batch = {"queries": (ids,), "keys": (ids + 1,), "weights": jnp.array([1.0, 1.0, 0])}
    loss_fn = embedding_loss(model, method=("first", "second"), temperature=0.2)
    loss, weight, metrics = loss_fn(variables, batch, {})
    queries = model.apply(variables, ids, method="first")
    keys = model.apply(variables, ids + 1, method="second")
    want = contrastive(queries, keys, weights=batch["weights"], temperature=0.2)
    np.testing.assert_allclose((loss, weight), want, rtol=1e-6)
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    nearest = np.argmax((queries @ unit.T)[:2, :2], axis=-1)
    assert metrics["accuracy"] == np.sum(np.asarray(nearest) == [0, 1])
    noisy = loss_fn(variables, batch, {"dropout": jax.random.key(0)})[0]
    assert noisy != loss
    without = {**batch, "weights": None}
    assert embedding_loss(model, method="first")(variables, without, {})[1] == 3


def test_a_model_of_embeddings_learns_its_pairs():
    lora = LoRAConfig(rank=2, alpha=4, targets=["query", "value"], dropout_rate=0.1)
    folder = GOLDEN / "sentence" / "qwen3_embedding"
    model = load_model(folder, lora=lora, key=jax.random.key(0))
    texts = jnp.asarray(np.random.default_rng(0).integers(3, 43, (2, 3, 6)))
    queries, keys = ((ids, jnp.ones((3, 6), int)) for ids in texts)
    tx = optax.adam(0.02)
    step = make_train_step(embedding_loss(model.module, method="encode"), tx)
    state = TrainState.create(model.variables, tx, jax.random.key(1))
    frozen = jax.tree.map(np.asarray, model.variables["frozen"])
    losses, metrics = [], {}
    for _ in range(20):
        state, metrics = step(state, {"queries": queries, "keys": keys})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["accuracy"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.variables["frozen"], frozen)
