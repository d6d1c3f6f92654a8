"""The loss of models that make embeddings: pairs that belong together."""

from typing import Any

import jax.numpy as jnp

from lora_jax.names import DROPOUT
from lora_jax.train.losses import contrastive
from lora_jax.train.step import LossFn


def embedding_loss(
    module: Any,
    *,
    method: str | tuple[str, str] = "embed",
    temperature: float = 0.05,
) -> LossFn:
    """Returns ``(variables, batch, rngs) -> (loss_sum, weight, {"accuracy": hits})``.

    The loss is `contrastive`: every other key of the batch (of the microbatch, where
    gradients are accumulated) is a negative. A hit is a query whose own key is nearest.

    Args:
      module: called as ``module.apply(variables, *inputs, method=method)``; returns
        embeddings ``[b, e]``.
      method: ``"embed"`` of an encoder, ``"encode"`` of a decoder; or one for queries
        and one for keys, as ``("embed_image", "embed")`` of CLIP.
      temperature: see `contrastive`.

    Returns:
      The loss function, for batches of ``queries`` and ``keys``, each the inputs of its
      method (such as ids and mask, both ``[b, t]``), and perhaps ``weights`` ``[b]``,
      0 for filler pairs; deterministic if ``rngs`` is empty.
    """
    ways = (method, method) if isinstance(method, str) else method

    def loss_fn(variables, batch, rngs):
        queries, keys = (
            module.apply(
                variables,
                *batch[name],
                method=way,
                deterministic=DROPOUT not in rngs,
                rngs=rngs,
            )
            for name, way in zip(("queries", "keys"), ways, strict=True)
        )
        weights = batch.get("weights")
        if weights is None:
            weights = jnp.ones(len(queries), jnp.float32)
        loss, weight = contrastive(
            queries, keys, weights=weights, temperature=temperature
        )
        length = jnp.linalg.norm(keys, axis=-1)
        scores = queries @ keys.T / jnp.maximum(length, 1e-12)
        nearest = jnp.argmax(jnp.where(weights != 0, scores, -jnp.inf), axis=-1)
        hits = jnp.sum(weights * (nearest == jnp.arange(len(keys))))
        return loss, weight, {"accuracy": hits}

    return loss_fn
