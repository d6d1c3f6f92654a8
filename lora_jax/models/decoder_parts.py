"""What the parts of a decoder share: the tokens' context, norms, a base class."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.linear import apply_linear
from lora_jax.nn.layer_rules import register_layer

Hidden = Float[Array, "b t d"]
Layer = int | Int[Array, ""]
Past = Any  # what a mixer keeps of the tokens before; () of a layer without; None


class PositionContext(NamedTuple):
    """Positions of a batch's tokens, shared by all layers.

    Attributes:
      cos: cosines of each rope table, ``[b, t, c]``.
      sin: sines.
      growth: ``[b, t]`` factors of the queries, or None.
      own: ``[b, t, l, p]`` what each layer reads of the tokens directly, or None.
      given: keys and values of another layer, for one without its own.
      lengths: ``[b]`` tokens of each row of prompts, else None.
      slots: ``[b, t]`` slots in the cache when decoding, else None.
      segment_ids: ``[b, t]`` example of each token in a packed row, or None.
      stacks: the `Stacks` of scanned layers' experts, or None.
      order: ``[t]`` place in its row of each token where a mesh splits rows, else None.
    """

    cos: tuple[Array, ...]
    sin: tuple[Array, ...]
    growth: Array | None
    slots: Any
    segment_ids: Array | None
    own: Array | None = None
    given: Any = None
    lengths: Array | None = None
    order: Array | None = None
    stacks: Any = None


class Head(nn.Dense):
    """The output head. ``"all-linear"`` leaves it out, as in PEFT; targets may name it.

    With an adapter here, the loss has to form the logits of every token.
    """


register_layer(Head, "...i,io->...o", kind="head")


class RMSNorm(nn.Module):
    """Computes ``x / √(mean(x²) + eps) * (offset + scale)``, in float32.

    Variables: ``scale`` ``[d]``.
    """

    eps: float
    offset: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the normalised ``x``, in ``dtype``."""
        ones = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", ones, x.shape[-1:])
        x = unit_rms(x.astype(jnp.float32), self.eps)
        return (x * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)


def unit_rms(x: Array, eps: float) -> Array:
    """Returns ``x / √(mean(x²) + eps)``, computed in float32, in the dtype of ``x``."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class DecoderModule(nn.Module):
    """Base class of a decoder's parts: config, dtype, norms and linear layers."""

    config: DecoderConfig
    dtype: Any = jnp.float32

    def dense(self, name: str, x: Array, width: int, use_bias: bool) -> Array:
        """Applies the linear layer ``name`` to ``[b, t, i]``, giving ``[b, t, width]``.

        A remat policy can save the result; see `apply_linear`.
        """
        layer = nn.Dense(width, use_bias=use_bias, dtype=self.dtype, name=name)
        return apply_linear(layer, x)

    def norm(self, name: str) -> nn.Module:
        """Returns the norm ``name``."""
        return make_norm(self.config, self.dtype, name)


def make_norm(config: DecoderConfig, dtype: Any, name: str | None) -> nn.Module:
    """Makes a norm of the config's type."""
    if config.norm == "layer":
        bias = config.has_norm_bias
        return nn.LayerNorm(config.norm_eps, dtype=dtype, use_bias=bias, name=name)
    return RMSNorm(config.norm_eps, config.norm_offset, dtype, name=name)
