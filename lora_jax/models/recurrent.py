"""What mixes the tokens in a hybrid's layers without attention.

Its cache has one size, whatever the length: the last tokens that a convolution sees,
and a recurrent state.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax.attention.gated_delta import causal_conv, gated_delta_rule, with_past
from lora_jax.models.cache import Recurrent
from lora_jax.models.decoder_parts import (
    DecoderModule,
    Hidden,
    Layer,
    Past,
    PositionContext,
    RMSNorm,
)
from lora_jax.names import BIAS, KERNEL

EPS = 1e-6  # of the length of queries and keys


class Convolution(nn.Module):
    """A causal convolution of each channel.

    Attributes:
      size: tokens that it sees.
      use_bias: whether each channel has a bias.

    Variables: ``kernel`` ``[j, 1, c]``, ``bias`` ``[c]``.
    """

    size: int
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Hidden, place: PositionContext, past: Past
    ) -> tuple[Hidden, Array]:
        """Returns ``[b, t, c]`` for ``[b, t, c]``, and the last inputs of each row."""
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = self.param(KERNEL, init, (self.size, 1, x.shape[-1]))
        before = None if past is None else past.inputs
        y = causal_conv(x, kernel[:, 0], past=before, segment_ids=place.segment_ids)
        if self.use_bias:
            bias = self.param(BIAS, nn.initializers.zeros, x.shape[-1:])
            y = y + bias.astype(y.dtype)
        return y, self._last(with_past(x, before, self.size), place)

    def _last(self, inputs: Array, place: PositionContext) -> Array:
        """The last inputs of each row's tokens, in the slots of `with_past`."""
        kept = self.size - 1
        if place.lengths is None:
            return inputs[:, inputs.shape[1] - kept :]
        slots = place.lengths[:, None] + jnp.arange(kept)
        return jnp.take_along_axis(inputs, slots[..., None], axis=1)


class DeltaNet(DecoderModule):
    """Gated DeltaNet: linear attention by the gated delta rule.

    Queries, keys and values are convolved over the last few tokens; queries and keys
    have length 1. The output is normalised per head and gated by ``silu(x W_gate)``.

    References:
      Yang et al., https://arxiv.org/abs/2412.06464, section 3.4.
    """

    @nn.compact
    def __call__(
        self, x: Hidden, place: PositionContext, layer: Layer, past: Past = None
    ) -> tuple[Hidden, Past]:
        """Applies the layer to ``[b, t, d]``.

        Args:
          x: ``[b, t, d]``.
          place: the tokens' examples and, of prompts, their lengths.
          layer: unused.
          past: what `Recurrent` keeps of the tokens before.

        Returns:
          ``[b, t, d]``, and what it keeps including these tokens.
        """
        del layer
        own: Any = self.config.mixer
        (b, t, _), n, h = x.shape, own.num_heads, own.key_dim
        keys, values = own.num_key_heads * h, n * own.value_dim

        qkv = self.dense("qkv", x, own.conv_channels, False)
        gate = self.dense("gate", x, values, False)
        beta = self.dense("beta", x, n, False)
        decay = self.dense("decay", x, n, False).astype(jnp.float32)
        qkv, inputs = Convolution(own.conv_size, name="conv")(qkv, place, past)
        query, key, value = jnp.split(nn.silu(qkv), [keys, 2 * keys], axis=-1)

        ones = nn.initializers.ones
        rate = self.param("decay_log", nn.initializers.zeros, (n,)).astype(jnp.float32)
        bias = self.param("decay_bias", ones, (n,)).astype(jnp.float32)
        beta = nn.sigmoid(beta).astype(jnp.float32)
        log_decay = -jnp.exp(rate) * nn.softplus(decay + bias)
        if place.lengths is not None:  # padding leaves the state as it is
            is_token = (jnp.arange(t) < place.lengths[:, None])[..., None]
            beta, log_decay = (jnp.where(is_token, y, 0) for y in (beta, log_decay))

        @jax.checkpoint  # the backward pass would keep a state per chunk, and more
        def mixed(query, key, value, log_decay, beta, state):
            return gated_delta_rule(
                _unit(query) * h**-0.5,
                _unit(key),
                value,
                log_decay,
                beta,
                state=state,
                segment_ids=place.segment_ids,
            )

        y, state = mixed(
            query.reshape(b, t, -1, h),
            key.reshape(b, t, -1, h),
            value.reshape(b, t, n, -1),
            log_decay,
            beta,
            None if past is None else past.state,
        )
        y = RMSNorm(self.config.norm_eps, dtype=self.dtype, name="norm")(y)
        y = _gated(y, gate.reshape(y.shape)).reshape(b, t, -1)
        y = self.dense("output", y, self.config.hidden_size, False)
        return y, Recurrent(inputs, state)


class ShortConv(DecoderModule):
    """LFM2's gated convolution: ``(c * conv(b * z)) W_out``, ``[b | c | z] = x W``."""

    @nn.compact
    def __call__(
        self, x: Hidden, place: PositionContext, layer: Layer, past: Past = None
    ) -> tuple[Hidden, Past]:
        """Applies the layer to ``[b, t, d]``; as `DeltaNet`'s."""
        del layer
        own: Any = self.config.mixer
        width = self.config.hidden_size
        inner = self.dense("input", x, 3 * width, own.has_bias)
        before, after, z = jnp.split(inner, 3, axis=-1)
        convolve = Convolution(own.conv_size, own.has_bias, name="conv")
        y, inputs = convolve(before * z, place, past)
        return self.dense("output", after * y, width, own.has_bias), Recurrent(inputs)


def _unit(x: Array) -> Array:
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)


@jax.checkpoint
def _gated(y: Array, gate: Array) -> Array:
    return (y * nn.silu(gate.astype(jnp.float32))).astype(y.dtype)
