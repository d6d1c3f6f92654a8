"""The transformer block of an encoder–decoder, as plain Linen modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lora_jax.attention.causal import plain_attention, write_slots
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.decoder_parts import RMSNorm
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.linear import apply_linear
from lora_jax.models.relative import relative_buckets
from lora_jax.names import ATTENDED
from lora_jax.parallel.activation_sharding import shard_rows

Hidden = Float[Array, "b t d"]
Pair = tuple[Array, Array]  # keys and values [b, s, n, h]; of a cache [b, n, s, h]


class Part(nn.Module):
    """Base class of the parts: config and dtype."""

    config: EncoderDecoderConfig
    dtype: Any = jnp.float32

    def dense(self, width: int) -> nn.Dense:
        """Makes a linear layer."""
        return nn.Dense(width, use_bias=False, dtype=self.dtype)

    def norm(self) -> RMSNorm:
        """Makes a norm."""
        return RMSNorm(self.config.norm_eps, dtype=self.dtype)


class Attention(Part):
    """Attention without scaling: ``softmax(q kᵀ + bias) v`` for each head.

    Attributes:
      has_biases: whether it has a table of relative position biases.
    """

    has_biases: bool = False

    def setup(self):
        """Creates the projections and the table."""
        cfg = self.config
        width = cfg.num_heads * cfg.head_dim
        self.query, self.key = self.dense(width), self.dense(width)
        self.value, self.output = self.dense(width), self.dense(cfg.hidden_size)
        if self.has_biases:
            self.relative_bias = nn.Embed(cfg.num_buckets, cfg.num_heads)

    def __call__(self, x: Hidden, pair: Pair, **options: Any) -> Hidden:
        """Attends from ``x`` to keys and values; options are `plain_attention`'s."""
        query = self._split(self.query, x)
        mixed = plain_attention(query, *pair, scale=1.0, **options)
        return self._merged(checkpoint_name(mixed, ATTENDED))

    def cached(
        self, x: Hidden, pair: Pair, mask: Array, bias: Array | None = None
    ) -> Hidden:
        """Attends from ``x`` to cached keys and values ``[b, n, s, h]``.

        Args:
          x: ``[b, t, d]``, few tokens.
          pair: heads come before slots, the order in which both products read them.
          mask: True where a query sees a key, ``[b, 1, 1 or t, s]``.
          bias: added to the scores ``[b, n, t, s]``, or None.
        """
        query, (key, value) = self._split(self.query, x), pair
        scores = jnp.einsum(
            "btnh,bnsh->bnts", query, key, preferred_element_type=jnp.float32
        )
        scores = scores if bias is None else scores + bias
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return self._merged(jnp.einsum("bnts,bnsh->btnh", weights, value))

    def _merged(self, mixed: Array) -> Hidden:
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        return apply_linear(self.output, mixed)

    def pair(self, x: Hidden) -> Pair:
        """Returns keys and values ``[b, s, n, h]`` of ``x``."""
        return self._split(self.key, x), self._split(self.value, x)

    def biases(self, distance: Array, *, is_causal: bool) -> Float[Array, "*b n t s"]:
        """Returns the biases of the distances ``[*b, t, s]`` from queries to keys."""
        cfg, reach = self.config, distance.shape[-1]
        buckets = relative_buckets(
            np.arange(1 - reach, reach),
            cfg.num_buckets,
            far=cfg.max_distance,
            is_causal=is_causal,
        )
        rows = self.relative_bias(jnp.asarray(buckets))  # [2 s - 1, n]
        return jnp.moveaxis(rows[distance + reach - 1], -1, -3)

    def _split(self, layer: nn.Dense, x: Array) -> Array:
        cfg = self.config
        x = apply_linear(layer, x)
        return x.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)


class Mlp(Part):
    """Computes ``act(x W_up) W_down``, or ``(act(x W_gate) * x W_up) W_down``."""

    def setup(self):
        """Creates the linear layers."""
        cfg = self.config
        if cfg.is_gated:
            self.gate, self.gated_up = (self.dense(cfg.mlp_size) for _ in range(2))
        else:
            self.up = self.dense(cfg.mlp_size)
        self.down = self.dense(cfg.hidden_size)

    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        act = ACTIVATIONS[self.config.activation]
        if self.config.is_gated:
            layers = self.gate, self.gated_up
            x = gate(act, *(apply_linear(layer, x) for layer in layers))
        else:
            x = jax.checkpoint(act)(apply_linear(self.up, x))
        return apply_linear(self.down, x)


class Block(Part):
    """One block: ``x + sublayer(norm(x))``, twice; in a decoder three times.

    Attributes:
      is_decoder: whether it is causal and reads the encoder's output.
      has_biases: whether its attention has a table of relative position biases.
    """

    is_decoder: bool = False
    has_biases: bool = False

    def setup(self):
        """Creates the sublayers and their norms."""
        parts = self.config, self.dtype
        self.attention_norm = self.norm()
        self.attention = Attention(*parts, self.has_biases)
        if self.is_decoder:
            self.cross_norm = self.norm()
            self.cross_attention = Attention(*parts)
        self.mlp_norm, self.mlp = self.norm(), Mlp(*parts)

    def __call__(
        self,
        x: Hidden,
        bias: Array | None,
        mask: Array | None,
        source: Hidden | None = None,
        source_mask: Array | None = None,
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``.

        Args:
          x: ``[b, t, d]``.
          bias: biases of the scores, ``[1, n, t, t]``, of this block or the first.
          mask: ``[b, 1, 1, t]``, False for padding; None in a decoder.
          source: the encoder's output ``[b, s, d]``, for a decoder.
          source_mask: ``[b, 1, 1, s]``, False for its padding.
        """
        y = self.attention_norm(x)
        pair, is_causal = self.attention.pair(y), self.is_decoder
        x = x + self.attention(y, pair, bias=bias, mask=mask, is_causal=is_causal)
        if source is not None:
            y, pair = self.cross_norm(x), self.cross_attention.pair(source)
            x = x + self.cross_attention(y, pair, mask=source_mask)
        return shard_rows(x + self.mlp(self.mlp_norm(x)))

    def step(
        self,
        x: Hidden,
        bias: Array | None,
        positions: Array,
        own: Pair,
        source: Pair,
        mask,
    ) -> tuple[Hidden, Pair]:
        """Runs the next tokens ``[b, t, d]``; returns the layer's new cache too."""
        y = self.attention_norm(x)
        key, value = (
            write_slots(past, new, positions)
            for past, new in zip(own, self.attention.pair(y), strict=True)
        )
        seen = positions[:, None, :, None] >= jnp.arange(key.shape[2])
        x = x + self.attention.cached(y, (key, value), seen, bias)
        x = x + self.cross_attention.cached(self.cross_norm(x), source, mask)
        return x + self.mlp(self.mlp_norm(x)), (key, value)

    def biases(self, distance: Array) -> Array:
        """Returns its attention's biases; see `Attention.biases`."""
        return self.attention.biases(distance, is_causal=self.is_decoder)

    def source_pair(self, source: Hidden) -> Pair:
        """Returns keys and values of the encoder's output, for a cache."""
        key, value = self.cross_attention.pair(source)
        return key.swapaxes(1, 2), value.swapaxes(1, 2)
