"""The decoder of `benchmarks.contenders` written for flax NNX, with `nnx.LoRA`.

As a user of NNX would write it; attention is this library's, to its advantage.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.ops.causal import causal_attention
from lora_jax.ops.rope import apply_rope, rope_angles


class Block(nnx.Module):
    """Attention and gated MLP; every linear is a base `nnx.Linear` in an `nnx.LoRA`."""

    def __init__(self, config: DecoderConfig, rank: int, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.mlp_size
        sizes = {
            **{name: (d, d) for name in ("query", "key", "value", "output")},
            **{"gate": (d, f), "up": (d, f), "down": (f, d)},
        }
        for name, (i, o) in sizes.items():
            base = nnx.Linear(i, o, use_bias=False, rngs=rngs)
            setattr(self, name, nnx.LoRA(i, rank, o, base_module=base, rngs=rngs))
        self.attention_norm, self.mlp_norm = (
            nnx.RMSNorm(d, epsilon=config.norm_eps, rngs=rngs) for _ in range(2)
        )
        self.config = config

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        b, t, d = x.shape
        heads = (b, t, self.config.num_heads, self.config.head_dim)
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).reshape(heads) for layer in (self.query, self.key, self.value)
        )
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        x = x + self.output(causal_attention(query, key, value).reshape(b, t, d))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class NnxDecoder(nnx.Module):
    """Token ids ``[b, t]`` to logits ``[b, t, v]``."""

    def __init__(self, config: DecoderConfig, rank: int, rngs: nnx.Rngs):
        v, d = config.vocab_size, config.hidden_size
        self.embed = nnx.Embed(v, d, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, rank, rngs) for _ in range(config.num_layers)]
        )
        self.norm = nnx.RMSNorm(d, epsilon=config.norm_eps, rngs=rngs)
        self.head = nnx.Linear(d, v, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns the logits."""
        (rope,) = self.config.ropes
        positions = jnp.arange(ids.shape[1])[None]
        angles = rope_angles(positions, jnp.asarray(rope.frequencies()))
        x, cos, sin = self.embed(ids), jnp.cos(angles), jnp.sin(angles)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))
