"""DoRA on any layer that LoRA knows: its output scaled, without its bias.

The layer runs as it is and gets LoRA's update; what comes out is scaled by ``m / n``,
one number an output. A tied head (``attend``) multiplies by the transposed table, so
there it is the input that is scaled.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.names import BIAS
from lora_jax.nn.layers import ATTEND, base_weight, layer_of
from lora_jax.ops.dora import column_norm, dora_scale, rescale


class OutputScale(NamedTuple):
    """What `lora_jax.ops.dora.rescale` takes besides the output.

    Attributes:
      scale: ``m / n``, broadcastable to the layer's output.
      bias: of the layer, broadcastable likewise, or None.
    """

    scale: AnyFloat
    bias: AnyFloat | None


def init_magnitude(module: nn.Module, inputs: tuple[Any, ...]) -> AnyFloat:
    """Returns the column norms of a bound layer's kernel.

    Args:
      module: a bound layer whose type is registered and whose weight exists.
      inputs: the arguments of its call.

    Returns:
      ``magnitude`` ``[*batch, *out]``, float32.
    """
    layer = layer_of(module)
    assert layer is not None
    kernel = jnp.asarray(base_weight(module, layer.weight))
    return column_norm(kernel, layer.contraction(module, *inputs))


def output_scale(
    module: nn.Module,
    inputs: tuple[Any, ...],
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    magnitude: AnyFloat,
    *,
    scaling: float,
) -> OutputScale:
    """Computes what scales the output of ``module``.

    Args:
      module: a bound layer whose type is registered.
      inputs: the arguments of its call.
      lora_a: A of this layer.
      lora_b: B of this layer.
      magnitude: m of this layer.
      scaling: ``alpha / rank``.

    Returns:
      The scale and the bias, laid out like the output.

    Raises:
      ValueError: if the layer has a ``bias`` of which the output's layout can't be
        told.
    """
    layer = layer_of(module)
    assert layer is not None
    scale = dora_scale(
        jnp.asarray(base_weight(module, layer.weight)),
        lora_a,
        lora_b,
        magnitude,
        scaling=scaling,
        contraction=layer.contraction(module, *inputs),
    )
    scale = layer.align(module, inputs, scale)
    bias = base_weight(module, BIAS)
    if bias is None:
        return OutputScale(scale, None)
    wanted = tuple(size for size in scale.shape if size > 1)
    if tuple(size for size in bias.shape if size > 1) != wanted:
        raise ValueError(
            f"bias of {type(module).__name__} must have one element for each output, "
            f"{list(scale.shape)}, for DoRA to scale all else; got {bias.shape}."
        )
    return OutputScale(scale, jnp.reshape(bias, scale.shape))


def scale_output(
    y: AnyFloat,
    module: nn.Module,
    method: str,
    inputs: tuple[Any, ...],
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    magnitude: AnyFloat,
    *,
    scaling: float,
) -> AnyFloat:
    """Makes DoRA's output of LoRA's.

    Args:
      y: the layer's output with its update.
      module: a bound layer whose type is registered.
      method: the method that was called.
      inputs: its arguments.
      lora_a: A of this layer.
      lora_b: B of this layer.
      magnitude: m of this layer.
      scaling: ``alpha / rank``.

    Returns:
      The output, in the dtype of ``y``.
    """
    if method == ATTEND:  # its input was scaled
        return y
    factors = (lora_a, lora_b, magnitude)
    return rescale(y, *output_scale(module, inputs, *factors, scaling=scaling))


def scale_query(
    query: AnyFloat,
    module: nn.Module,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    magnitude: AnyFloat,
    *,
    scaling: float,
) -> AnyFloat:
    """Scales the input of a tied head: ``x (m / n ⊙ (E + scaling * A B))ᵀ``.

    Args:
      query: ``[*b, d]``.
      module: a bound embedding.
      lora_a: A of this layer.
      lora_b: B of this layer.
      magnitude: m of this layer, ``[d]``.
      scaling: ``alpha / rank``.

    Returns:
      What ``attend`` is to be called with.
    """
    factors = (lora_a, lora_b, magnitude)
    return rescale(query, *output_scale(module, (query,), *factors, scaling=scaling))
