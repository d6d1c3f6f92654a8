"""Language model loss: next-token cross-entropy that never materialises the logits.

`causal_lm` is the pure function of hidden states and head; `make_lm_loss` makes the
loss function of a training step for a decoder, with or without adapters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from lora_jax.array_types import Scalar
from lora_jax.names import (
    DROPOUT,
    EMBEDDING,
    FROZEN,
    KERNEL,
    LORA,
    PARAMS,
    ROUTED,
    TOKEN_ROWS,
)
from lora_jax.ops.product import check_floating
from lora_jax.ops.token_rows import row_deltas
from lora_jax.parallel.activation_sharding import (
    gather_kernel,
    num_row_shards,
    target_platform,
)
from lora_jax.parallel.device_kind import target_kind
from lora_jax.parallel.sequence import fold, sequence_shards
from lora_jax.train.balance import balance_loss
from lora_jax.train.chunked_nll import Options, chunked_nll
from lora_jax.train.losses import (
    as_weights,
    check_rows,
    clip_masked,
    softmax_cross_entropy,
)
from lora_jax.train.step import LossFn

# A CPU's chunks: logits that stay in its caches,
LOGITS_AT_ONCE = 2**22
CHUNK_TOKENS = 128  # but at least this many tokens, to reuse the head enough
# An accelerator's: so many tokens that reading the head takes a small part of the time
# of multiplying by it. On an H100 a step of Llama-3.2-1B's shape took 136 ms with
# chunks of 128 tokens, 121 with 512, 119.5 with 1024, 119 with 8192. A TPU's logits
# stay on the chip if they are few: 4,096 tokens, width 4,096 and 32,000 words take 21.0
# million cycles on v5e with chunks of 512 tokens, 23.5 with 2048, 25.8 with 256, by the
# compiler's estimate.
HEAD_REUSE = {"gpu": 8, "tpu": 2}
LOGITS_SHARE = 32  # but at most this part of its memory for a chunk's logits,
LOGIT_BYTES = 4 + 2  # in float32, and their gradients in bfloat16

DECODER_INPUTS = ("input_ids", "positions", "segment_ids")


def causal_lm(
    hidden: Float[Array, "b t d"],
    head_kernel: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    weights: Shaped[Array, "b t"] | None = None,
    *,
    chunk: int = 1024,
    softcap: float | None = None,
    deltas: Float[Array, "n d"] | None = None,
    tokens: Sequence[int] = (),
) -> tuple[Scalar, Scalar]:
    """Next-token cross-entropy that never materialises the ``[b, t, v]`` logits.

    Computes ``Σ w (-log softmax(hidden @ head_kernel)[label])`` and ``Σ w``, ``chunk``
    tokens at a time, the same number from each row; chunks without weight are skipped.
    If ``hidden`` is differentiated, the forward pass also computes its gradient
    ``(p - onehot) @ head_kernelᵀ`` (the loss is a sum, so the backward pass only scales
    it), which saves one of three matmuls with the head. The head's gradient is computed
    only if the head is differentiated.

    Args:
      hidden: ``[b, t, d]`` last hidden states; sets the dtype of the matmuls.
      head_kernel: ``[d, v]``; for a tied embedding ``[v, d]`` pass its transpose.
      labels: ``[b, t]`` target token of each position, already shifted.
      weights: ``[b, t]`` weight or mask of each position; all 1 if None.
      chunk: number of tokens whose logits are in memory at once, ``chunk * v`` floats;
        at least one of each row.
      softcap: ``c`` of logits capped as ``c tanh(logits / c)``, or None.
      deltas: what is added to the head's columns of some tokens, from
        `lora_jax.ops.token_rows.row_deltas`; None for nothing.
      tokens: these ``n`` tokens.

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
    check_floating(head_kernel=head_kernel)
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
    options = Options(chunk, softcap, tuple(tokens))
    loss: Array = chunked_nll(options, hidden, head_kernel, labels, weights, deltas)
    return loss, jnp.sum(weights)


def chunk_tokens(vocab_size: int) -> int:
    """Returns the number of tokens per chunk for a vocabulary size.

    On an accelerator a chunk of ``c`` tokens does ``c`` FLOPs for each byte of the head
    that it reads, so ``c`` is the platform's `HEAD_REUSE` times what keeps the device's
    arithmetic busy, as far as the logits fit.

    Args:
      vocab_size: ``v``.

    Returns:
      Tokens whose logits are in memory at once.
    """
    platform = target_platform()
    if platform == "cpu":
        return max(CHUNK_TOKENS, LOGITS_AT_ONCE // vocab_size)
    device, reuse = target_kind(), HEAD_REUSE["tpu" if platform == "tpu" else "gpu"]
    room = device.memory // (LOGITS_SHARE * LOGIT_BYTES * vocab_size)
    tokens = max(device.intensity, min(room, reuse * device.intensity))
    return 2 ** round(math.log2(tokens))  # which divides most batches


def make_lm_loss(
    module: Any,
    *,
    is_tied: bool,
    softcap: float | None = None,
    chunk: int | None = None,
    inputs: Sequence[str] = DECODER_INPUTS,
    router_aux_loss_coef: float = 0.0,
) -> LossFn:
    """Makes the loss function of a training step of a decoder or encoder–decoder.

    Args:
      module: the model, adapted or not. Its method ``hidden`` is called with
        ``inputs``; its head is the leaf ``head/kernel`` or the tied
        ``embed/embedding``. A head with its own adapter is called through ``logits``,
        which materialises them.
      is_tied: whether the head is the embedding.
      softcap: bound on the logits, or None.
      chunk: number of tokens per chunk, over the whole batch (per shard if the batch is
        sharded); None for `chunk_tokens`.
      inputs: what the model reads of a batch; `lora_jax.train.pairs.INPUTS` for an
        `EncoderDecoder`.
      router_aux_loss_coef: factor of `balance_loss`, which is added to the loss of each
        target and is the metric ``router_aux_loss``; 0 leaves it out. Padding, where
        ``segment_ids`` are 0, does not count.

    Returns:
      ``(variables, batch, rngs) -> (loss_sum, weight, metrics)`` for batches of
      ``input_ids``, ``labels`` (already shifted), ``weights`` and optionally
      ``positions`` and ``segment_ids``, all ``[b, t]``; deterministic if ``rngs`` is
      empty. It raises a ValueError if there is a factor and ``module`` has no experts.

    Raises:
      ValueError: if the factor is negative or not finite.
    """
    owner, leaf = ("embed", EMBEDDING) if is_tied else ("head", KERNEL)
    if not 0 <= router_aux_loss_coef < math.inf:
        raise ValueError(
            f"router_aux_loss_coef must be at least 0; got {router_aux_loss_coef}."
        )
    routed: Any = {"mutable": [ROUTED]} if router_aux_loss_coef else {}

    def loss_fn(variables: Mapping[str, Any], batch: Mapping[str, Array], rngs):
        hidden: Any = module.apply(
            variables,
            *(batch.get(name) for name in inputs),
            deterministic=DROPOUT not in rngs,
            method="hidden",
            rngs=rngs,
            **routed,
        )
        if not routed:
            return (*of_hidden(hidden, variables, batch, rngs), {})
        hidden, kept = hidden
        loss, weight = of_hidden(hidden, variables, batch, rngs)
        segments = batch.get("segment_ids")
        is_token = None if segments is None else segments != 0
        added = weight * balance_loss(kept.get(ROUTED, {}), is_token)
        return loss + router_aux_loss_coef * added, weight, {"router_aux_loss": added}

    def of_hidden(hidden: Array, variables: Mapping[str, Any], batch, rngs):
        labels, weights = batch["labels"], batch["weights"]
        if owner in variables.get(LORA, {}):
            logits = module.apply(
                variables,
                hidden,
                deterministic=DROPOUT not in rngs,
                method="logits",
                rngs=rngs,
            )
            return softmax_cross_entropy(logits, labels, weights=weights)
        trained = variables.get(PARAMS, {}).get(owner, {})
        kernel = (trained if leaf in trained else variables[FROZEN][owner])[leaf]
        at_once = chunk or chunk_tokens(kernel.size // hidden.shape[-1])
        kernel, rows = gather_kernel(kernel.T if is_tied else kernel), {}
        if TOKEN_ROWS in trained:
            tokens = module.config.tokens_for(owner)
            deltas = row_deltas(trained[TOKEN_ROWS], kernel.T, tokens)
            rows = {"deltas": deltas, "tokens": tokens}
        return causal_lm(
            fold(hidden),
            kernel,
            fold(labels),
            fold(weights),
            chunk=at_once * num_row_shards() * sequence_shards(),
            softcap=softcap,
            **rows,
        )

    return loss_fn
