"""Losses as pure functions that return a weighted sum and the total weight.

Every loss returns ``(loss_sum, weight)``, both float32 scalars: the caller divides
once, after summing over microbatches and devices. Unlike a mean of means, this is
correct when masks differ.

A row of weight 0 is ignored, whatever its label (e.g. ``-100``). A label outside
``[0, v)`` in a row with weight makes the loss NaN, because values can't be inspected
under ``jit``; `encode_labels` checks them on the host.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped

from lora_jax.array_types import Scalar
from lora_jax.ops.product import check_floating

Logits = Float[Array, "*b v"]
Labels = Int[Array, "*b"]
Weights = Shaped[Array, "*b"]  # numbers, or a boolean mask


def softmax_cross_entropy(
    logits: Logits,
    labels: Labels,
    *,
    weights: Weights | None = None,
    label_smoothing: float = 0.0,
    class_weights: Float[Array, " v"] | None = None,
) -> tuple[Scalar, Scalar]:
    """Cross-entropy of integer labels under a softmax.

    Computes ``Σ w_b [(1 - ε) c_y (-log p_y) + ε/v Σ_k c_k (-log p_k)]`` and
    ``Σ w_b c_y``, with ``p = softmax(logits)`` in float32, row weights ``w``, class
    weights ``c`` and smoothing ``ε``.

    Args:
      logits: ``[*b, v]``, any floating dtype.
      labels: ``[*b]`` integers in ``[0, v)``.
      weights: ``[*b]`` weight or mask of each row; all 1 if None.
      label_smoothing: ``ε`` in ``[0, 1)``, the probability mass shared by all classes.
      class_weights: ``[v]`` weight ``c`` of each class; all 1 if None.

    Returns:
      The summed loss and the summed weight, float32 scalars.

    Raises:
      ValueError: if shapes disagree or ``label_smoothing`` is outside ``[0, 1)``.
      TypeError: if logits are not floating or labels not integers.

    Example:
      >>> loss, weight = softmax_cross_entropy(jnp.zeros((4, 2)), jnp.arange(4) % 2)
      >>> f"{loss / weight:.4f}"  # log 2
      '0.6931'

    References:
      Label smoothing: Szegedy et al., https://arxiv.org/abs/1512.00567, section 7.
      With class weights the terms are those of ``torch.nn.CrossEntropyLoss``.
    """
    check_rows("logits", logits, labels, weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"label_smoothing must be in [0, 1); got {label_smoothing}. "
            "0.1 is a common choice."
        )
    v = logits.shape[-1]
    if class_weights is None:
        class_weights = jnp.ones((v,), jnp.float32)
    elif class_weights.shape != (v,):
        raise ValueError(
            f"class_weights must be [v] = [{v}], one for each class of logits of shape "
            f"{logits.shape}; got {class_weights.shape}."
        )
    weights = as_weights(weights, labels.shape)
    labels = clip_masked(labels, weights, v)
    class_weights = class_weights.astype(jnp.float32)
    nll = -jax.nn.log_softmax(logits.astype(jnp.float32)) * class_weights  # [*b, v]
    loss = pick(nll, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * nll.mean(axis=-1)
    row_weights = weights * class_weights[labels]
    return jnp.sum(weights * loss), jnp.sum(row_weights)


def squared_error(
    predictions: Float[Array, "*b"],
    targets: Num[Array, "*b"],
    *,
    weights: Shaped[Array, "..."] | None = None,
) -> tuple[Scalar, Scalar]:
    """Squared error for regression, summed over rows and features.

    Computes ``Σ w (p - t)²`` and ``Σ w``, ``w`` broadcast over trailing features, so
    that their quotient is the mean squared error.

    Args:
      predictions: ``[*b]`` or ``[*b, k]``, any floating dtype.
      targets: the same shape; a ``[b]`` target for a ``[b, 1]`` prediction is an error,
        not a ``[b, b]`` broadcast.
      weights: the shape of the targets, or their leading dimensions; 1 if None.

    Returns:
      The summed loss and the summed weight, float32 scalars.

    Raises:
      ValueError: if shapes disagree.
      TypeError: if predictions are not floating.

    Example:
      >>> loss, weight = squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]))
      >>> float(loss), float(weight)
      (5.0, 2.0)
    """
    check_floating(predictions=predictions)
    if predictions.shape != targets.shape:
        raise ValueError(
            "predictions and targets must have the same shape; got "
            f"{predictions.shape} and {targets.shape}. Squeeze a head of one output: "
            "`predictions[..., 0]`."
        )
    shape = targets.shape
    if weights is None:
        weights = jnp.ones(shape, jnp.float32)
    if weights.shape != shape[: weights.ndim]:
        raise ValueError(
            f"weights must have the leading dimensions of the targets, {shape}; got "
            f"{weights.shape}."
        )
    weights = weights.astype(jnp.float32)
    weights = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
    weights = jnp.broadcast_to(weights, shape)
    targets = jnp.where(weights != 0, targets.astype(jnp.float32), 0)
    error = predictions.astype(jnp.float32) - targets
    return jnp.sum(weights * jnp.square(error)), jnp.sum(weights)


def contrastive(
    queries: Float[Array, "b d"],
    keys: Float[Array, "b d"],
    *,
    negatives: Float[Array, "b d"] | None = None,
    weights: Shaped[Array, " b"] | None = None,
    temperature: float = 0.05,
) -> tuple[Scalar, Scalar]:
    """Symmetric contrastive loss with in-batch negatives.

    Computes ``Σ_i w_i ½ (CE([S N][i, :], i) + CE(S[:, i], i))`` and ``Σ w_i``, with
    ``S = cos(queries, keysᵀ) / temperature`` and ``N`` the same of ``negatives``, if
    there are any. Rows of weight 0 are not negatives.

    Args:
      queries: ``[b, d]``; need not be normalised.
      keys: ``[b, d]``; ``keys[i]`` belongs to ``queries[i]``.
      negatives: ``[b, d]``, keys that belong to no query; each counts for all of them.
      weights: ``[b]`` weight or mask of each pair; all 1 if None.
      temperature: softmax temperature, above 0.

    Returns:
      The summed loss and the summed weight, float32 scalars.

    Raises:
      ValueError: if shapes disagree, ``b < 2``, or the temperature is not above 0.
      TypeError: if queries or keys are not floating.

    Example:
      >>> loss, weight = contrastive(jnp.eye(2), jnp.eye(2), temperature=1.0)
      >>> f"{loss / weight:.4f}"  # log(1 + 1/e)
      '0.3133'

    References:
      InfoNCE: van den Oord et al., https://arxiv.org/abs/1807.03748, equation 4; both
      directions: CLIP, https://arxiv.org/abs/2103.00020, figure 3.
    """
    check_floating(queries=queries, keys=keys)
    if queries.ndim != 2 or queries.shape != keys.shape or queries.shape[0] < 2:
        raise ValueError(
            "queries and keys must both be [b, d] with b >= 2; got "
            f"{queries.shape} and {keys.shape}. A batch of one pair has no negatives."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}.")
    b = queries.shape[0]
    if weights is not None and weights.shape != (b,):
        raise ValueError(f"weights must be [b] = [{b}]; got {weights.shape}.")
    if negatives is not None and negatives.shape != queries.shape:
        raise ValueError(
            f"negatives must be [b, d] = {queries.shape}; got {negatives.shape}."
        )
    weights = as_weights(weights, (b,))
    scores = _unit(queries) @ _unit(keys).T / temperature  # [b, b]
    is_negative = (weights != 0) & ~jnp.eye(b, dtype=bool)
    is_seen = is_negative | jnp.eye(b, dtype=bool)
    diagonal, rows, is_seen_in_rows = jnp.diagonal(scores), scores, is_seen
    if negatives is not None:
        others = _unit(queries) @ _unit(negatives).T / temperature
        rows = jnp.concatenate([scores, others], axis=1)  # [b, 2 b]
        is_real = jnp.broadcast_to(weights != 0, (b, b))
        is_seen_in_rows = jnp.concatenate([is_seen, is_real], axis=1)
    loss = sum(
        jax.nn.logsumexp(s, axis=-1, where=where) - diagonal
        for s, where in ((rows, is_seen_in_rows), (scores.T, is_seen))
    )
    return jnp.sum(weights * loss) / 2, jnp.sum(weights)


def clip_masked(labels: Array, weights: Array, v: int) -> Array:
    """Replaces the labels of rows of weight 0, which may be invalid."""
    return jnp.where(weights != 0, labels, jnp.clip(labels, 0, v - 1))


def pick(values: Array, labels: Array) -> Array:
    """Returns ``values[..., label]``, NaN where the label is out of range."""
    v = values.shape[-1]
    is_valid = (labels >= 0) & (labels < v)
    index = jnp.clip(labels, 0, v - 1)[..., None]
    picked = jnp.take_along_axis(values, index, axis=-1)[..., 0]
    return jnp.where(is_valid, picked, jnp.nan)


def _unit(x: Array) -> Array:
    """Normalises rows in float32; zero rows and their gradients stay zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def as_weights(weights: Array | None, shape: tuple[int, ...]) -> Array:
    """Returns weights in float32, ones if None."""
    if weights is None:
        return jnp.ones(shape, jnp.float32)
    return weights.astype(jnp.float32)


def check_rows(name: str, x: Array, labels: Array, weights: Array | None) -> None:
    """Raises unless there is one integer label and one weight per row."""
    check_floating(**{name: x})
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, one for each row; got {labels.dtype}. "
            "For targets that are real numbers use squared_error."
        )
    if x.ndim < 1 or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the leading dimensions of {name}, {x.shape[:-1]}; got "
            f"{labels.shape}. Labels are class numbers, not one-hot rows."
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(
            f"weights must have the shape of labels, {labels.shape}; got "
            f"{weights.shape}."
        )
