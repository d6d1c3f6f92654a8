"""Text generation: a compiled prefill, and a compiled step for each token.

A decoder goes on with a prompt; an encoder–decoder answers it. Prompts of a batch are
padded on the right, and every row keeps its own position, so a row's text doesn't
depend on its neighbours. Shapes are rounded up: prompts of similar lengths, and any
number of new tokens up to the cache's size, share a compilation.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.family import config_of
from lora_jax.nn.rows import RowAdapted

MULTIPLE = 64  # prompts and caches are padded to a multiple of this
OnToken = Callable[[int, list[int]], bool | None]


def generate(
    module: nn.Module | RowAdapted,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    key: PRNGKey | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continues prompts, greedily or by sampling.

    Args:
      module: a `Decoder` or an `EncoderDecoder`, with or without adapters, or the
        module of an `AdapterBank`.
      variables: for ``module.apply``.
      prompts: token ids of each prompt, at least one; sources of an encoder–decoder.
      max_new_tokens: the longest continuation.
      stop_ids: tokens that end a row; excluded from its continuation.
      temperature: sampling temperature; 0 takes the likeliest token.
      top_p: samples from the fewest tokens whose probabilities reach this sum.
      top_k: samples from this many likeliest tokens; 0 for all.
      key: PRNG key, required if ``temperature`` is above 0.
      on_token: called after each new token with the row number and its continuation so
        far; return True to end the row (at a stop string, say).

    Returns:
      The new token ids of each prompt.

    Raises:
      ValueError: if the model has no decoder, there is no prompt, one is empty, a token
        is out of range, prompt and continuation exceed the model's context, or a
        sampling value is out of range.
    """
    config = config_of(module)
    is_answer = isinstance(config, EncoderDecoderConfig)
    if is_answer and not config.predicts:
        raise ValueError(
            "module must have a decoder to write tokens; it is the encoder of an "
            "encoder–decoder alone (num_decoder_layers = 0)."
        )
    _check_sampling(temperature, top_p, top_k, key)
    _check_prompts(prompts, max_new_tokens, config)
    lengths = np.array([len(prompt) for prompt in prompts])
    width = min(_round_up(int(lengths.max())), config.max_positions)
    before = np.ones_like(lengths) if is_answer else lengths  # of the written tokens
    size = min(_round_up(int(before.max()) + max_new_tokens), config.max_positions)
    ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt

    is_long = (
        None if is_answer else _is_long(int(lengths.max()), max_new_tokens, config)
    )
    prefill, decode = _compiled(module, size, temperature > 0, is_long)
    key = jax.random.key(0) if key is None else key
    sampling = (key, temperature, top_p, top_k)
    token, cache = prefill(variables, ids, lengths, *sampling)
    stops = frozenset(stop_ids)
    texts: list[list[int]] = [[] for _ in prompts]
    is_open = np.ones(len(prompts), bool)
    for count in range(max_new_tokens):
        is_last = count + 1 == max_new_tokens
        following = None
        if not is_last:  # dispatched before the host reads the current tokens
            following = decode(variables, token, before + count, cache, *sampling)
        for row, new in enumerate(np.asarray(token).tolist()):
            if not is_open[row]:
                continue
            if new in stops:
                is_open[row] = False
                continue
            texts[row].append(new)
            if on_token is not None and on_token(row, texts[row]):
                is_open[row] = False
        if following is None or not is_open.any():
            break
        token, cache = following
    return texts


def sample(
    logits: Float[Array, " v"],
    key: PRNGKey,
    temperature: float | Array,
    top_p: float | Array,
    top_k: int | Array,
) -> Int[Array, ""]:
    """Draws a token from ``softmax(logits / temperature)`` after top-p and top-k.

    Args:
      logits: ``[v]`` float32.
      key: PRNG key.
      temperature: above 0.
      top_p: keeps the fewest likeliest tokens whose probabilities sum to this or more.
      top_k: keeps this many likeliest tokens; 0 for all.

    References:
      top-p: Holtzman et al., https://arxiv.org/abs/1904.09751, section 3.1.
    """
    order = jnp.argsort(-logits)
    ranked = logits[order] / temperature  # likeliest first
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    rank = jnp.arange(len(logits))
    kept = (before < top_p) & ((rank < top_k) | (top_k == 0)) | (rank == 0)
    choice = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf))
    return order[choice].astype(jnp.int32)


@functools.lru_cache(maxsize=32)
def _compiled(
    module: nn.Module | RowAdapted, size: int, is_sampled: bool, is_long: bool | None
):
    """Returns the jitted prefill and decode for caches with ``size`` slots.

    ``is_long`` is None for an encoder–decoder, which has no such choice.
    """
    options: dict[str, Any] = {} if is_long is None else {"is_long": is_long}

    def choose(variables, hidden, positions, key, *sampling):
        logits: Any = module.apply(variables, hidden, method="logits")
        logits = logits[:, 0]
        if not is_sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def draw(row, position, logits):  # with its own key, whatever the other rows
            own = jax.random.fold_in(jax.random.fold_in(key, row), position)
            return sample(logits, own, *sampling)

        return jax.vmap(draw)(jnp.arange(len(logits)), positions, logits)

    def answer(variables, ids, lengths, *sampling):
        mask = jnp.arange(ids.shape[1]) < lengths[:, None]
        hidden, cache = module.apply(variables, ids, mask, size, method="prefill")
        return choose(variables, hidden, jnp.zeros_like(lengths), *sampling), cache

    def prefill(variables, ids, lengths, *sampling):
        hidden, cache = module.apply(
            variables,
            ids,
            size,
            lengths=lengths,
            is_long=is_long,
            method="prefill",
        )
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        return choose(variables, last, lengths - 1, *sampling), cache

    def decode(variables, token, positions, cache, *sampling):
        hidden, cache = module.apply(
            variables,
            token[:, None],
            positions[:, None],
            cache,
            method="decode",
            **options,
        )
        return choose(variables, hidden, positions, *sampling), cache

    first = answer if is_long is None else prefill
    return jax.jit(first), jax.jit(decode, donate_argnums=3)


def _is_long(longest: int, max_new_tokens: int, config: Any) -> bool:
    """Returns whether a cache uses longrope's long factors; it can't switch later."""
    original = config.original_positions
    if original is not None and longest <= original < longest + max_new_tokens - 1:
        raise ValueError(
            f"max_new_tokens must be at most {original - longest + 1} for a prompt of "
            f"{longest} tokens; got {max_new_tokens}. This model's positions (longrope)"
            f" are rotated differently beyond {original} tokens, so the cache can't be "
            "used there; generate that many, then continue with prompt and text as the "
            "new prompt."
        )
    return original is not None and longest > original


def _round_up(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE


def _check_sampling(
    temperature: float, top_p: float, top_k: int, key: PRNGKey | None
) -> None:
    faults = []
    if not 0 <= temperature < float("inf"):
        faults.append(f"temperature must be at least 0; got {temperature}")
    if not 0 < top_p <= 1:
        faults.append(f"top_p must be in (0, 1]; got {top_p}")
    if top_k < 0:
        faults.append(f"top_k must be at least 0, 0 for all tokens; got {top_k}")
    if temperature > 0 and key is None:
        faults.append("key must be a PRNG key if temperature > 0; got None")
    if faults:
        raise ValueError("; ".join(faults) + ".")


def _check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: Any
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt; got none.")
    faults = []
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            faults.append(f"prompt {row} has no token")
        elif min(prompt) < 0 or max(prompt) >= config.vocab_size:
            faults.append(
                f"prompt {row}: ids must be in [0, {config.vocab_size}); got "
                f"{min(prompt)} to {max(prompt)}"
            )
        elif len(prompt) + max_new_tokens > config.max_positions:
            faults.append(
                f"prompt {row}: its {len(prompt)} tokens and max_new_tokens = "
                f"{max_new_tokens} exceed the model's context of "
                f"{config.max_positions}"
            )
    if faults:
        shown = "; ".join(faults[:20])
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(
            f"prompts can't be continued: {shown}{more}. Shorten them or ask for fewer "
            "new tokens."
        )
