"""The classification loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import classification_loss


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask, *, deterministic):
        x = nn.Embed(9, 4)(input_ids) * attention_mask[..., None]
        x = nn.Dropout(0.5, deterministic=deterministic)(x.sum(axis=1))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def model():
    return Classifier()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "input_ids": jnp.array(rng.integers(0, 9, (4, 5))),
        "attention_mask": jnp.array([[1, 1, 1, 0, 0]] * 4),
        "labels": jnp.array([0, 2, 1, 0]),
        "weights": jnp.array([1.0, 1.0, 1.0, 0.0]),
    }


@pytest.fixture(scope="module")
def variables(model, batch):
    inputs = batch["input_ids"], batch["attention_mask"]
    return model.init(jax.random.key(1), *inputs, deterministic=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_is_the_cross_entropy_of_rows_with_weight(
    smoothing, model, batch, variables
):
    inputs = batch["input_ids"], batch["attention_mask"]
    logits = np.asarray(model.apply(variables, *inputs, deterministic=True), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = log_p[np.arange(4), batch["labels"]]
    rows = -(1 - smoothing) * own - smoothing * log_p.mean(-1)
    loss_fn = classification_loss(model, label_smoothing=smoothing)
    loss, weight, metrics = loss_fn(variables, batch, {})
    np.testing.assert_allclose(loss, rows[:3].sum(), rtol=1e-5)
    assert weight == 3
    hits = logits.argmax(-1) == np.asarray(batch["labels"])
    assert metrics["accuracy"] == hits[:3].sum()


def test_dropout_is_active_only_with_a_key(model, batch, variables):
    loss_fn = classification_loss(model)
    losses = [
        float(loss_fn(variables, batch, rngs)[0])
        for rngs in ({}, {}, {"dropout": jax.random.key(0)})
    ]
    assert losses[0] == losses[1] != losses[2]
