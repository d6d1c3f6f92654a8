"""The loss of language models: next-token cross-entropy that never forms the logits.

`causal_lm` is the pure function of hidden states and head; `make_lm_loss` makes the
loss function of a training step from a decoder, with or without adapters.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int, Shaped

from lora_jax.array_types import Scalar
from lora_jax.names import DROPOUT, EMBEDDING, FROZEN, KERNEL, LORA, PARAMS
from lora_jax.train.losses import (
    as_weights,
    check_floating,
    check_rows,
    clip_masked,
    pick,
    softmax_cross_entropy,
)
from lora_jax.train.step import LossFn

LOGITS_AT_ONCE = 2**24  # floats; a chunk of tokens is as many as make no more


def causal_lm(
    hidden: Float[Array, "b t d"],
    head_kernel: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    weights: Shaped[Array, "b t"] | None = None,
    *,
    chunk: int = 1024,
    softcap: float | None = None,
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
      softcap: ``c`` of logits that are bounded as ``c tanh(logits / c)``, or None.

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
    check_rows("hidden", hidden, labels, weights)
    check_floating("head_kernel", head_kernel)
    d = hidden.shape[-1]
    if head_kernel.ndim != 2 or head_kernel.shape[0] != d:
        raise ValueError(
            f"head_kernel must be [d, v] = [{d}, v] for hidden of shape {hidden.shape};"
            f" got {head_kernel.shape}. A tied embedding is [v, d]: pass its transpose."
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token; got {chunk}.")
    weights = as_weights(weights, labels.shape)
    labels = clip_masked(labels, weights, head_kernel.shape[1])
    tokens = labels.size
    chunk = min(chunk, max(tokens, 1))
    count = -(-tokens // chunk)

    def split(x: Array) -> Array:
        # Chunk i takes tokens i, i + count, ...: the leading axis stays the batch's,
        # so a batch sharded over devices stays where it is.
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, chunk * count - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunk, count, *x.shape[1:]).swapaxes(0, 1)

    chunks = (split(hidden), head_kernel, split(labels), split(weights))
    loss: Array = _chunked_nll(softcap, *chunks)
    return loss, jnp.sum(weights)


def _nll(
    hidden: Array, kernel: Array, labels: Array, softcap: float | None
) -> tuple[Array, Array, Array | float]:
    """One chunk's ``-log p_label`` ``[c]``, ``log p`` ``[c, v]``, slope of the cap."""
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    slope: Array | float = 1.0
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1 - bounded * bounded
    log_p = jax.nn.log_softmax(logits)
    return -pick(log_p, labels), log_p, slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(
    softcap: float | None, hidden: Array, kernel: Array, labels: Array, weights: Array
) -> Array:
    """Sums the loss over chunks ``hidden [n, c, d]``, ``labels, weights [n, c]``."""

    def body(total, xs):
        h, y, w = xs
        return total + jnp.sum(w * _nll(h, kernel, y, softcap)[0]), None

    return jax.lax.scan(body, jnp.float32(0), (hidden, labels, weights))[0]


def _chunked_nll_fwd(
    softcap: float | None,
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
        nll, log_p, slope = _nll(h, w0, y, softcap)
        d_hidden = None
        if hidden.perturbed or kernel.perturbed:
            one_hot = jax.nn.one_hot(y, w0.shape[1], dtype=jnp.float32)
            d_logits = w[:, None] * (jnp.exp(log_p) - one_hot) * slope
            d_logits = d_logits.astype(h.dtype)
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


def _chunked_nll_bwd(softcap, residuals, g: Array | SymbolicZero):
    del softcap
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    d_hidden, d_kernel, nll = residuals

    def scale(x: Array | None) -> Array | None:
        return None if x is None else (g * x).astype(x.dtype)

    return scale(d_hidden), scale(d_kernel), None, scale(nll)


_chunked_nll.defvjp(_chunked_nll_fwd, _chunked_nll_bwd, symbolic_zeros=True)


def make_lm_loss(module: Any, *, is_tied: bool, softcap: float | None = None) -> LossFn:
    """Makes the loss of a decoder's training step.

    Args:
      module: a `Decoder`, adapted or not: its method ``hidden`` is called with
        ``(input_ids, positions, segment_ids)``, its head is the leaf ``head/kernel`` or
        the tied ``embed/embedding``. A head with an adapter of its own is called by
        ``logits``, and forms them.
      is_tied: whether the head is the embedding.
      softcap: bound of the logits, or None.

    Returns:
      ``(variables, batch, rngs) -> (loss_sum, weight, {})`` for batches
      of ``input_ids``, ``labels`` (already shifted), ``weights`` and perhaps
      ``positions`` and ``segment_ids``, all ``[b, t]``; deterministic where ``rngs`` is
      empty.
    """
    owner, leaf = ("embed", EMBEDDING) if is_tied else ("head", KERNEL)

    def loss_fn(variables: Mapping[str, Any], batch: Mapping[str, Array], rngs):
        is_deterministic = DROPOUT not in rngs
        hidden = module.apply(
            variables,
            batch["input_ids"],
            batch.get("positions"),
            batch.get("segment_ids"),
            deterministic=is_deterministic,
            method="hidden",
            rngs=rngs,
        )
        labels, weights = batch["labels"], batch["weights"]
        if owner in variables.get(LORA, {}):
            logits = module.apply(
                variables,
                hidden,
                deterministic=is_deterministic,
                method="logits",
                rngs=rngs,
            )
            loss, weight = softmax_cross_entropy(logits, labels, weights=weights)
            return loss, weight, {}
        holder = PARAMS if owner in variables.get(PARAMS, {}) else FROZEN
        kernel = variables[holder][owner][leaf]
        vocab_size = kernel.size // hidden.shape[-1]
        chunk = max(1, LOGITS_AT_ONCE // vocab_size)
        loss, weight = causal_lm(
            hidden,
            kernel.T if is_tied else kernel,
            labels,
            weights,
            chunk=chunk,
            softcap=softcap,
        )
        return loss, weight, {}

    return loss_fn
