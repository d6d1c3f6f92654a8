"""Classification loss and accuracy."""

from typing import Any

import jax.numpy as jnp

from lora_jax.names import DROPOUT
from lora_jax.train.losses import softmax_cross_entropy
from lora_jax.train.step import LossFn


def classification_loss(module: Any, *, label_smoothing: float = 0.0) -> LossFn:
    """Returns ``(variables, batch, rngs) -> (loss_sum, weight, {"accuracy": hits})``.

    Args:
      module: called as ``module.apply(variables, input_ids, attention_mask)``; returns
        logits ``[b, classes]``.
      label_smoothing: see `softmax_cross_entropy`.

    Returns:
      The loss function, for batches of ``input_ids``, ``attention_mask``, ``labels``
      and ``weights``, as `Batches` makes them; deterministic if ``rngs`` is empty.
    """

    def loss_fn(variables, batch, rngs):
        logits = module.apply(
            variables,
            batch["input_ids"],
            batch["attention_mask"],
            deterministic=DROPOUT not in rngs,
            rngs=rngs,
        )
        labels, weights = batch["labels"], batch["weights"]
        loss, weight = softmax_cross_entropy(
            logits, labels, weights=weights, label_smoothing=label_smoothing
        )
        hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels))
        return loss, weight, {"accuracy": hits}

    return loss_fn
