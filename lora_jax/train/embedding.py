"""The loss of models that make embeddings: pairs that belong together."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.names import DROPOUT
from lora_jax.train.losses import contrastive
from lora_jax.train.step import LossFn

ROLES = ("queries", "keys", "negatives")


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
      method (such as ids and mask, both ``[b, t]``), and perhaps ``negatives``, keys
      that belong to no query, and ``weights`` ``[b]``, 0 for filler pairs;
      deterministic if ``rngs`` is empty.
    """
    ways = (method, method) if isinstance(method, str) else method

    def loss_fn(variables, batch, rngs):
        found = embed_roles(module, variables, batch, ways, rngs)
        return pair_loss(found, batch.get("weights"), temperature=temperature)

    return loss_fn


def embed_roles(
    module: Any,
    variables: Any,
    batch: Mapping[str, Any],
    ways: tuple[str, str],
    rngs: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the embeddings ``[b, e]`` of each of `ROLES` in a batch.

    Inputs of one method and shape go through the model together.

    Args:
      module: see `embedding_loss`.
      variables: of the model.
      batch: see `embedding_loss`.
      ways: the method of queries, and that of keys.
      rngs: of adapter dropout; empty for none.
    """
    way_of = dict(zip(ROLES, (*ways, ways[1]), strict=True))
    together: dict[Any, list[str]] = {}
    for role in ROLES:
        if role in batch:
            shapes = tuple(x.shape for x in batch[role])
            together.setdefault((way_of[role], shapes), []).append(role)
    found = {}
    for (way, _), roles in together.items():
        inputs = map(
            jnp.concatenate, zip(*(batch[role] for role in roles), strict=True)
        )
        rows = module.apply(
            variables,
            *inputs,
            method=way,
            deterministic=DROPOUT not in rngs,
            rngs=rngs,
        )
        found |= zip(roles, jnp.split(rows, len(roles)), strict=True)
    return found


def pair_loss(
    found: Mapping[str, Any], weights: Any = None, *, temperature: float = 0.05
) -> tuple[Any, Any, dict[str, Any]]:
    """Returns the sums of `embedding_loss` for the embeddings of `embed_roles`."""
    queries, keys, negatives = found[ROLES[0]], found[ROLES[1]], found.get(ROLES[2])
    if weights is None:
        weights = jnp.ones(len(queries), jnp.float32)
    loss, weight = contrastive(
        queries, keys, negatives=negatives, weights=weights, temperature=temperature
    )
    count, is_real = len(keys), weights != 0
    if negatives is not None:
        keys = jnp.concatenate([keys, negatives])
        is_real = jnp.concatenate([is_real, is_real])
    length = jnp.linalg.norm(keys, axis=-1)
    scores = queries @ keys.T / jnp.maximum(length, 1e-12)
    nearest = jnp.argmax(jnp.where(is_real, scores, -jnp.inf), axis=-1)
    hits = jnp.sum(weights * (nearest == jnp.arange(count)))
    return loss, weight, {"accuracy": hits}
