"""Losses as pure functions that return a sum and the weight it was taken over.

Every loss here returns ``(loss_sum, weight)``, both float32 scalars: the caller divides
once, after it has added up microbatches and devices. A mean of means is wrong as soon
as masks differ; a sum of sums never is.

A row of weight 0 counts for nothing, whatever its label holds (``-100``, say). A label
outside ``[0, v)`` in a row that counts makes the loss NaN, because values can't be
inspected under ``jit``; `encode_labels` checks them on the host.
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int, Num, Shaped

from lora_jax.array_types import Scalar

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
      label_smoothing: ``ε`` in ``[0, 1)``, the mass spread over all classes.
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
    _check_rows("logits", logits, labels, weights)
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
    weights = _as_weights(weights, labels.shape)
    labels = _clip_masked(labels, weights, v)
    class_weights = class_weights.astype(jnp.float32)
    nll = -jax.nn.log_softmax(logits.astype(jnp.float32)) * class_weights  # [*b, v]
    loss = _pick(nll, labels)
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
    _check_floating("predictions", predictions)
    if predictions.shape != targets.shape:
        raise ValueError(
            "predictions and targets must have one shape; got "
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
    weights: Shaped[Array, " b"] | None = None,
    temperature: float = 0.05,
) -> tuple[Scalar, Scalar]:
    """Symmetric contrastive loss with the other rows of the batch as negatives.

    Computes ``Σ_i w_i ½ (CE(S[i, :], i) + CE(S[:, i], i))`` and ``Σ w_i``, with
    ``S = cos(queries, keysᵀ) / temperature``. Rows of weight 0 are nobody's negatives.

    Args:
      queries: ``[b, d]``; need not be normalised.
      keys: ``[b, d]``; ``keys[i]`` belongs to ``queries[i]``.
      weights: ``[b]`` weight or mask of each pair; all 1 if None.
      temperature: above 0; smaller is sharper.

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
    _check_floating("queries", queries)
    _check_floating("keys", keys)
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
    weights = _as_weights(weights, (b,))
    scores = _unit(queries) @ _unit(keys).T / temperature  # [b, b]
    is_negative = (weights != 0) & ~jnp.eye(b, dtype=bool)
    is_seen = is_negative | jnp.eye(b, dtype=bool)
    diagonal = jnp.diagonal(scores)
    loss = sum(
        jax.nn.logsumexp(s, axis=-1, where=is_seen) - diagonal
        for s in (scores, scores.T)
    )
    return jnp.sum(weights * loss) / 2, jnp.sum(weights)


def causal_lm(
    hidden: Float[Array, "b t d"],
    head_kernel: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    weights: Shaped[Array, "b t"] | None = None,
    *,
    chunk: int = 1024,
) -> tuple[Scalar, Scalar]:
    """Next-token cross-entropy whose ``[b, t, v]`` logits never exist.

    Computes ``Σ w (-log softmax(hidden @ head_kernel)[label])`` and ``Σ w``, ``chunk``
    tokens at a time. Where ``hidden`` is differentiated, the same pass over the tokens
    also makes its gradient ``(p - onehot) @ head_kernelᵀ`` (the loss is a sum, so the
    backward pass only scales it): three matmuls with the head become two. The
    head's gradient is formed only where the head itself is differentiated.

    Args:
      hidden: ``[b, t, d]`` last hidden states; sets the dtype of the matmuls.
      head_kernel: ``[d, v]``; for a tied embedding ``[v, d]`` pass its transpose.
      labels: ``[b, t]`` the token each position has to predict: already shifted.
      weights: ``[b, t]`` weight or mask of each position; all 1 if None.
      chunk: tokens whose logits exist at once; memory is ``chunk * v`` floats.

    Returns:
      The summed loss and the summed weight, float32 scalars.

    Raises:
      ValueError: if shapes disagree or ``chunk`` is below 1.
      TypeError: if hidden or the kernel are not floating, or labels not integers.

    Example:
      >>> labels = jnp.zeros((2, 5), int)
      >>> loss, weight = causal_lm(jnp.ones((2, 5, 3)), jnp.zeros((3, 7)), labels)
      >>> f"{jnp.exp(loss / weight):.3f}"  # perplexity of a uniform guess
      '7.000'
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [b, t, d]; got {hidden.shape}.")
    _check_rows("hidden", hidden, labels, weights)
    _check_floating("head_kernel", head_kernel)
    d = hidden.shape[-1]
    if head_kernel.ndim != 2 or head_kernel.shape[0] != d:
        raise ValueError(
            f"head_kernel must be [d, v] = [{d}, v] for hidden of shape {hidden.shape};"
            f" got {head_kernel.shape}. A tied embedding is [v, d]: pass its transpose."
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token; got {chunk}.")
    weights = _as_weights(weights, labels.shape)
    labels = _clip_masked(labels, weights, head_kernel.shape[1])
    tokens = labels.size
    chunk = min(chunk, max(tokens, 1))
    count = -(-tokens // chunk)

    def split(x: Array) -> Array:
        # Chunk i takes tokens i, i + count, ...: the leading axis stays the batch's,
        # so a batch sharded over devices stays where it is.
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, chunk * count - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunk, count, *x.shape[1:]).swapaxes(0, 1)

    loss = _chunked_nll(split(hidden), head_kernel, split(labels), split(weights))
    return loss, jnp.sum(weights)


def _nll(hidden: Array, kernel: Array, labels: Array) -> tuple[Array, Array]:
    """Returns ``-log p_label`` ``[c]`` and ``log p`` ``[c, v]`` of one chunk."""
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    return -_pick(log_p, labels), log_p


@jax.custom_vjp
def _chunked_nll(hidden: Array, kernel: Array, labels: Array, weights: Array) -> Array:
    """Sums the loss over chunks ``hidden [n, c, d]``, ``labels, weights [n, c]``."""

    def body(total, xs):
        h, y, w = xs
        return total + jnp.sum(w * _nll(h, kernel, y)[0]), None

    return jax.lax.scan(body, jnp.float32(0), (hidden, labels, weights))[0]


def _chunked_nll_fwd(
    hidden: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    labels: CustomVJPPrimal,
    weights: CustomVJPPrimal,
):
    """The loss together with its gradients, chunk by chunk.

    ``perturbed`` says which arguments are differentiated: a frozen head costs nothing.
    """
    w0 = kernel.value
    d_kernel = jnp.zeros(w0.shape, jnp.float32) if kernel.perturbed else None

    def body(carry, xs):
        total, d_kernel = carry
        h, y, w = xs
        nll, log_p = _nll(h, w0, y)
        d_hidden = None
        if hidden.perturbed or kernel.perturbed:
            one_hot = jax.nn.one_hot(y, w0.shape[1], dtype=jnp.float32)
            d_logits = (w[:, None] * (jnp.exp(log_p) - one_hot)).astype(h.dtype)
            if hidden.perturbed:
                d_hidden = jnp.dot(d_logits, w0.astype(h.dtype).T)
            if kernel.perturbed:
                d_kernel += jnp.dot(h.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * nll), d_kernel), (d_hidden, nll)

    (total, d_kernel), (d_hidden, nll) = jax.lax.scan(
        body,
        (jnp.float32(0), d_kernel),
        (hidden.value, labels.value, weights.value),
    )
    if d_kernel is not None:
        d_kernel = d_kernel.astype(w0.dtype)
    return total, (d_hidden, d_kernel, nll if weights.perturbed else None)


def _chunked_nll_bwd(residuals, g: Array | SymbolicZero):
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    d_hidden, d_kernel, nll = residuals

    def scale(x: Array | None) -> Array | None:
        return None if x is None else (g * x).astype(x.dtype)

    return scale(d_hidden), scale(d_kernel), None, scale(nll)


_chunked_nll.defvjp(_chunked_nll_fwd, _chunked_nll_bwd, symbolic_zeros=True)


def _clip_masked(labels: Array, weights: Array, v: int) -> Array:
    """Makes the labels of rows of weight 0 valid: they may hold anything."""
    return jnp.where(weights != 0, labels, jnp.clip(labels, 0, v - 1))


def _pick(values: Array, labels: Array) -> Array:
    """Returns ``values[..., label]``, NaN where the label is out of range."""
    v = values.shape[-1]
    is_valid = (labels >= 0) & (labels < v)
    index = jnp.clip(labels, 0, v - 1)[..., None]
    picked = jnp.take_along_axis(values, index, axis=-1)[..., 0]
    return jnp.where(is_valid, picked, jnp.nan)


def _unit(x: Array) -> Array:
    """Scales rows to length 1 in float32; a zero row stays zero, gradient included."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def _as_weights(weights: Array | None, shape: tuple[int, ...]) -> Array:
    if weights is None:
        return jnp.ones(shape, jnp.float32)
    return weights.astype(jnp.float32)


def _check_floating(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating; got {x.dtype}.")


def _check_rows(name: str, x: Array, labels: Array, weights: Array | None) -> None:
    _check_floating(name, x)
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
