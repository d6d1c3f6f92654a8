"""The transformer block of all encoders, as plain Linen modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.attention.causal import bidirectional_attention
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.encoder_config import BlockConfig
from lora_jax.parallel.activation_sharding import shard_rows

Hidden = Float[Array, "b t d"]


class Attention(nn.Module):
    """Bidirectional multi-head self-attention over the unmasked tokens."""

    config: BlockConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden, mask: Array | None) -> Hidden:
        """Returns ``[b, t, d]``; ``mask`` is boolean ``[b, t]``, True = real."""
        cfg = self.config
        heads = (*x.shape[:-1], cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        query, key, value = (
            nn.Dense(cfg.hidden_size, cfg.has_qkv_bias, dtype=self.dtype, name=name)(
                x
            ).reshape(heads)
            for name in ("query", "key", "value")
        )  # each [b, t, n, h]
        mixed = bidirectional_attention(query, key, value, mask)
        return nn.Dense(cfg.hidden_size, dtype=self.dtype, name="output")(
            mixed.reshape(x.shape)
        )


class Mlp(nn.Module):
    """Computes ``activation(x W_up) W_down``, or the gated form of it."""

    config: BlockConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        cfg, activation = self.config, ACTIVATIONS[self.config.activation]
        if cfg.is_gated:
            both = nn.Dense(2 * cfg.mlp_size, dtype=self.dtype, name="gate_up")(x)
            x, last = gate(activation, *jnp.split(both, 2, axis=-1)), "gated_down"
        else:
            x, last = nn.Dense(cfg.mlp_size, dtype=self.dtype, name="up")(x), "down"
            x = jax.checkpoint(activation)(x)  # [b, t, f]; saves only x
        return nn.Dense(cfg.hidden_size, dtype=self.dtype, name=last)(x)


class Block(nn.Module):
    """One block: ``norm(x + f(x))`` or ``x + f(norm(x))``, twice."""

    config: BlockConfig
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Hidden, mask: Array | None, deterministic: bool = True
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``; ``mask`` as for `Attention`."""
        cfg, drop, x = self.config, nn.Dropout(self.dropout_rate), shard_rows(x)

        def add(x: Hidden, sublayer: Callable[[Hidden], Hidden], name: str) -> Hidden:
            norm = nn.LayerNorm(cfg.norm_eps, dtype=self.dtype, name=f"{name}_norm")
            is_pre = cfg.norm_placement == "pre"
            y = sublayer(norm(x) if is_pre else x)
            if cfg.has_layer_scale:
                ones = nn.initializers.ones
                scale = self.param(f"{name}_scale", ones, (cfg.hidden_size,))
                y = y * scale.astype(y.dtype)
            y = drop(y, deterministic=deterministic)
            return x + y if is_pre else norm(x + y)

        attention = Attention(cfg, self.dtype, name="attention")
        x = add(x, lambda y: attention(y, mask), "attention")
        return add(x, Mlp(cfg, self.dtype, name="mlp"), "mlp")
