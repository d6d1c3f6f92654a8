"""The arithmetic of a training step: a decoder's as a formula, any one's as traced.

XLA's own count takes the body of a loop once, however often it runs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.names import KERNEL
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target


class StepFlops(NamedTuple):
    """Floating-point operations of a step on the whole batch.

    Attributes:
      lora: with adapters.
      full: with all weights trained, the same policy of recomputing.
    """

    lora: float
    full: float

    @property
    def saved(self) -> float:
        """The fraction that LoRA saves."""
        return 1 - self.lora / self.full


def step_flops(
    config: DecoderConfig,
    params: Any,
    targets: Sequence[Target],
    batch: int,
    tokens: int,
    remat: str,
) -> StepFlops:
    """Counts the multiplications and additions of a step's matmuls.

    Computes, a token, with ``N`` the kernels' elements, ``A`` the adapters', ``H`` the
    head's and ``S = 4 Σ_layers n h · (mean number of keys seen)``:
    LoRA ``4N + 6A + 4H + 3S``, full ``6N + 6H + 3S``; computing blocks again adds their
    forward pass, ``2N + S`` (and ``2A``).

    Args:
      config: the decoder's.
      params: shapes of the frozen weights.
      targets: the adapted layers.
      batch: rows.
      tokens: of a row.
      remat: what the backward pass computes again.

    Returns:
      FLOPs of both.

    References:
      Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1.
    """
    kernels = sum(
        math.prod(leaf.shape)
        for path, leaf in flatten(params).items()
        if path.endswith(f"/{KERNEL}") and not path.startswith("head/")
    )
    adapters = sum(target.trainable for target in targets)
    head = config.hidden_size * config.vocab_size
    keys = sum(_mean_keys(tokens, window) for window in config.layer_windows)
    scores = 4 * config.num_heads * config.head_dim * keys
    again = 1 if remat == "block" else 0  # "lora" keeps what matmuls made
    lora = (4 + 2 * again) * kernels + (6 + 2 * again) * adapters
    full = (6 + 2 * again) * kernels
    scores *= 3 + again
    rows = batch * tokens
    return StepFlops(
        lora=float(rows * (lora + 4 * head + scores)),
        full=float(rows * (full + 6 * head + scores)),
    )


def traced_flops(jaxpr: Jaxpr) -> float:
    """Counts the multiplications and additions of a program's products.

    Args:
      jaxpr: of the whole program, ``jit(f).trace(...).jaxpr.jaxpr``.

    Returns:
      FLOPs of its matmuls and convolutions: a scan's body as often as it runs, that of
      a loop without a known end once, of a condition's branches the dearest. Nothing is
      seen of what a kernel of a library does, such as cuDNN's attention.
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
        else:
            inner = [traced_flops(each) for each in _inner(params)]
            once = max(inner, default=0.0) if kind == "cond" else sum(inner)
            total += once * (params["length"] if kind == "scan" else 1)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside of an equation."""
    for value in jax.tree.leaves(params):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _mean_keys(tokens: int, window: int | None) -> float:
    """Returns how many keys a query sees in the mean: causal, in a window."""
    w = tokens if window is None else min(window, tokens)
    return (w * (w + 1) / 2 + (tokens - w) * w) / tokens
