"""FLOPs of a training step: by formula for a decoder, by tracing for any model.

XLA's own cost analysis counts a loop body only once, however often it runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.names import EXPERTS, KERNEL
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target

# The primitives of `ops.grouped`, and what JAX computes them with.
GROUPED = ("grouped_dot", "grouped_outer", "ragged_dot_general")


class StepFlops(NamedTuple):
    """Floating-point operations of a step on the whole batch.

    Attributes:
      lora: with adapters.
      full: with full fine-tuning, with the same rematerialisation policy.
    """

    lora: float
    full: float

    @property
    def saved(self) -> float:
        """The fraction of FLOPs that LoRA saves; 0 if ``full`` is not known."""
        return 1 - self.lora / self.full if self.full else 0.0


def step_flops(
    config: DecoderConfig,
    params: Any,
    targets: Sequence[Target],
    batch: int,
    tokens: int,
    remat: str,
) -> StepFlops:
    """Counts the FLOPs of a step's matmuls.

    Per token, with ``N`` the elements of the kernels, ``A`` of the adapters (of experts
    those that a token is sent to), ``H`` of the head, and ``S`` the sum over layers of
    ``4 n h · (mean number of visible keys)``, without attention `token_flops`: LoRA
    ``4N + 6A + 4H + 3S``, full ``6N + 6H + 3S``; rematerialising blocks adds their
    forward pass, ``2N + S`` (and ``2A``).

    Args:
      config: the decoder's config.
      params: shapes of the frozen weights.
      targets: the adapted layers.
      batch: rows.
      tokens: tokens per row.
      remat: the rematerialisation policy.

    Returns:
      FLOPs of both.

    References:
      Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1.
    """
    share = 1.0 if config.experts is None else config.experts.active_share
    rows = batch * tokens

    def passes(path: str) -> float:
        return rows * (share if f"/{EXPERTS}/" in path else 1)

    layers = [config.of_layer(i) for i in range(config.num_layers)]
    scores = sum(
        _mixing(layer, tokens, window)
        for layer, window in zip(layers, config.layer_windows, strict=True)
    )
    head = config.hidden_size * config.vocab_size * rows
    again = int(remat == "block")  # "lora" saves the outputs of matmuls
    scores *= rows * (3 + again)
    return _step(params, targets, passes, head, scores, again)


def pair_step_flops(
    config: EncoderDecoderConfig,
    params: Any,
    targets: Sequence[Target],
    batch: int,
    read: int,
    written: int,
    remat: str,
) -> StepFlops:
    """Counts the FLOPs of a step's matmuls of an encoder–decoder.

    By `step_flops`' formula; the encoder's kernels and the cross-attention's keys and
    values are counted for the tokens that are read, the others for those written.
    Every query is multiplied with all keys of its row, those after it too, and the
    backward pass computes the scores again.

    Args:
      config: the model's config.
      params: shapes of the frozen weights.
      targets: the adapted layers.
      batch: rows.
      read: tokens of a source.
      written: tokens of a target.
      remat: the rematerialisation policy.

    Returns:
      FLOPs of both.
    """

    def passes(path: str) -> float:
        of_source = "cross_attention/key", "cross_attention/value"
        is_read = path.startswith("encoder/") or any(end in path for end in of_source)
        return batch * (read if is_read else written)

    head = config.hidden_size * config.vocab_size * written * batch
    pairs = config.num_layers * read * read
    pairs += config.num_decoder_layers * written * (written + read)
    scores = 4 * config.num_heads * config.head_dim * pairs
    again = int(remat == "block")
    scores *= batch * (3.5 + again)
    return _step(params, targets, passes, head, scores, again)


def _step(
    params: Any,
    targets: Sequence[Target],
    passes: Callable[[str], float],
    head: int,
    scores: float,
    again: int,
) -> StepFlops:
    """Applies `step_flops`' formula; ``passes`` are the rows of a layer's input."""
    kernels = sum(
        math.prod(leaf.shape) * passes(path)
        for path, leaf in flatten(params).items()
        if path.endswith(f"/{KERNEL}") and not path.startswith("head/")
    )
    adapters = sum(target.trainable * passes(target.path) for target in targets)
    lora = (4 + 2 * again) * kernels + (6 + 2 * again) * adapters
    full = (6 + 2 * again) * kernels
    return StepFlops(float(lora + 4 * head + scores), float(full + 6 * head + scores))


def traced_flops(jaxpr: Jaxpr) -> float:
    """Counts the FLOPs of the matmuls and convolutions of a whole program's jaxpr.

    A scan's body counts once per iteration, a while loop's body once, a conditional as
    its most expensive branch. Library kernels such as cuDNN attention are not counted.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in summed)
        elif kind == "conv_general_dilated":
            kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(out) * math.prod(kernel) / outputs
        elif kind in GROUPED:  # by rows, however a device computes it
            rows, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2.0 * math.prod(rows) * out[-1]
        else:
            inner = [traced_flops(each) for each in _inner(params)]
            once = max(inner, default=0.0) if kind == "cond" else sum(inner)
            total += once * (params["length"] if kind == "scan" else 1)
    return total


def _mixing(layer: DecoderConfig, tokens: int, window: int | None) -> float:
    """Returns FLOPs per token of a layer's mixer, without those of its kernels."""
    if layer.mixer is not None:
        return layer.mixer.token_flops(tokens)
    keys = _mean_keys(tokens, window, is_causal=layer.is_causal)
    return 4 * layer.num_heads * layer.head_dim * keys


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs nested in an equation's parameters."""
    for value in jax.tree.leaves(params):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _mean_keys(tokens: int, window: int | None, *, is_causal: bool) -> float:
    """Returns the mean number of keys visible to a query, in its window."""
    w = tokens if window is None else min(window, tokens)
    before = (w * (w + 1) / 2 + (tokens - w) * w) / tokens
    return before if is_causal else 2 * before - 1
