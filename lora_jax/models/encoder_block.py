"""The transformer block of all encoders, as plain Linen modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.attention.causal import bidirectional_attention, causal_attention
from lora_jax.attention.rope import apply_rope, rope_angles
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.disentangled import distance_scores
from lora_jax.models.encoder_config import BlockConfig
from lora_jax.parallel.activation_sharding import shard_rows

Hidden = Float[Array, "b t d"]


class Attention(nn.Module):
    """Multi-head self-attention over the unmasked tokens, or the earlier of them.

    Attributes:
      config: the sizes.
      dtype: of the computation.
      layer: the number of its block.
    """

    config: BlockConfig
    dtype: Any = jnp.float32
    layer: int = 0

    @nn.compact
    def __call__(
        self, x: Hidden, mask: Array | None, bias: Array | None = None
    ) -> Hidden:
        """Attends.

        Args:
          x: ``[b, t, d]``.
          mask: boolean ``[b, t]``, True = real; None: all are.
          bias: added to the scores, ``[1, n, t, t]``; in disentangled attention the
            table of distances ``[p, d]``; or None.

        Returns:
          ``[b, t, d]``.
        """
        cfg, width = self.config, self.config.hidden_size
        heads = (*x.shape[:-1], cfg.num_heads, width // cfg.num_heads)

        def dense(name: str, width: int) -> nn.Module:
            return nn.Dense(width, cfg.has_qkv_bias, dtype=self.dtype, name=name)

        layers = {}
        if cfg.is_qkv_fused:
            parts = jnp.split(dense("qkv", 3 * width)(x), 3, axis=-1)
        else:
            layers = {name: dense(name, width) for name in ("query", "key", "value")}
            parts = [layer(x) for layer in layers.values()]
        query, key, value = (part.reshape(heads) for part in parts)  # [b, t, n, h]
        if cfg.layer_ropes:
            rope = cfg.layer_ropes[self.layer]
            frequencies = jnp.asarray(rope.frequencies())
            angles = rope_angles(jnp.arange(x.shape[1])[None], frequencies)
            cos, sin = (f(angles) * rope.attention_factor for f in (jnp.cos, jnp.sin))
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        if cfg.disentangled is not None:
            assert bias is not None  # the encoder has made the table
            if not cfg.disentangled.is_shared:
                layers = {
                    name: dense(f"distance_{name}", width) for name in ("query", "key")
                }

            def project(name: str, rows: Array) -> Array:
                return layers[name](rows).reshape(-1, *heads[2:])

            bias = distance_scores(cfg.disentangled, query, key, bias, project)
            query = query / cfg.disentangled.num_scores**0.5
        window = cfg.layer_windows[self.layer] if cfg.layer_windows else None
        if cfg.is_causal:
            segments = None if mask is None else mask.astype(jnp.int32)
            mixed = causal_attention(query, key, value, segment_ids=segments)
        else:
            mixed = bidirectional_attention(
                query, key, value, mask, bias=bias, window=window
            )
        return nn.Dense(
            width, use_bias=cfg.has_output_bias, dtype=self.dtype, name="output"
        )(mixed.reshape(x.shape))


class Mlp(nn.Module):
    """Computes ``activation(x W_up) W_down``, or the gated form of it."""

    config: BlockConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        cfg, activation = self.config, ACTIVATIONS[self.config.activation]

        def dense(width: int, name: str) -> nn.Module:
            return nn.Dense(width, cfg.has_mlp_bias, dtype=self.dtype, name=name)

        if cfg.is_gated:
            both = dense(2 * cfg.mlp_size, "gate_up")(x)
            x, last = gate(activation, *jnp.split(both, 2, axis=-1)), "gated_down"
        else:
            x, last = dense(cfg.mlp_size, "up")(x), "down"
            x = jax.checkpoint(activation)(x)  # [b, t, f]; saves only x
        return dense(cfg.hidden_size, last)(x)


class Block(nn.Module):
    """One block: ``norm(x + f(x))`` or ``x + f(norm(x))``, twice.

    Attributes:
      config: the sizes.
      dtype: of the computation.
      dropout_rate: dropout on each sublayer's output.
      layer: its number.
    """

    config: BlockConfig
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    layer: int = 0

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        mask: Array | None,
        deterministic: bool = True,
        bias: Array | None = None,
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``; the others are `Attention`'s."""
        cfg, drop, x = self.config, nn.Dropout(self.dropout_rate), shard_rows(x)

        def add(x: Hidden, sublayer: Callable[[Hidden], Hidden], name: str) -> Hidden:
            has_norm = cfg.has_first_norm or self.layer > 0 or name != "attention"
            norm = (
                make_norm(cfg, self.dtype, f"{name}_norm") if has_norm else _unchanged
            )
            is_pre = cfg.norm_placement == "pre"
            y = sublayer(norm(x) if is_pre else x)
            if cfg.has_layer_scale:
                ones = nn.initializers.ones
                scale = self.param(f"{name}_scale", ones, (cfg.hidden_size,))
                y = y * scale.astype(y.dtype)
            y = drop(y, deterministic=deterministic)
            return x + y if is_pre else norm(x + y)

        attention = Attention(cfg, self.dtype, self.layer, name="attention")
        x = add(x, lambda y: attention(y, mask, bias), "attention")
        return add(x, Mlp(cfg, self.dtype, name="mlp"), "mlp")


class ConvBlock(nn.Module):
    """Computes ``norm(x + act(conv(embedded)))``, with zeros at padding.

    Variables: ``conv/{kernel,bias}``, ``norm/{scale,bias}``.
    """

    config: BlockConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embedded: Hidden, x: Hidden, mask: Array | None) -> Hidden:
        """Returns ``[b, t, d]``.

        Args:
          embedded: the embeddings ``[b, t, d]``.
          x: the first block's output.
          mask: boolean ``[b, t]``, True = real; None: all are.
        """
        own = self.config.conv
        assert own is not None
        real = 1 if mask is None else mask[..., None].astype(x.dtype)
        convolve = nn.Conv(
            self.config.hidden_size,
            (own.size,),
            padding="SAME",  # its size is odd
            feature_group_count=own.groups,
            dtype=self.dtype,
            name="conv",
        )
        activation = {**ACTIVATIONS, "tanh": jnp.tanh}[own.activation]
        y = activation(convolve(embedded * real) * real)
        return make_norm(self.config, self.dtype, "norm")(x + y) * real


def make_norm(config: BlockConfig, dtype: Any, name: str | None) -> nn.LayerNorm:
    """Makes the LayerNorm called ``name`` of an encoder."""
    bias = config.has_norm_bias
    return nn.LayerNorm(config.norm_eps, dtype=dtype, use_bias=bias, name=name)


def _unchanged(x: Hidden) -> Hidden:
    return x
