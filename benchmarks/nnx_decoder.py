"""The decoder of `benchmarks.contenders` written for flax NNX, with `nnx.LoRA`.

Written as an NNX user would, except that it uses this library's faster attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.attention.causal import causal_attention
from lora_jax.attention.rope import apply_rope, rope_angles
from lora_jax.models.decoder_config import DecoderConfig


def lora_linear(i: int, o: int, rank: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LoRA:
    """Makes an `nnx.LoRA` around an `nnx.Linear` ``[i, o]`` without bias."""
    base = nnx.Linear(i, o, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return nnx.LoRA(i, rank, o, base_module=base, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Attention and gated MLP; every linear is adapted."""

    def __init__(self, config: DecoderConfig, rank: int, dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.mlp_size
        q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        sizes = {
            **{"query": (d, q), "key": (d, kv), "value": (d, kv), "output": (q, d)},
            **{"gate": (d, f), "up": (d, f), "down": (f, d)},
        }
        for name, (i, o) in sizes.items():
            setattr(self, name, lora_linear(i, o, rank, dtype, rngs))
        self.attention_norm, self.mlp_norm = (
            nnx.RMSNorm(d, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        self.config = config

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        b, t, _ = x.shape
        heads = (b, t, -1, self.config.head_dim)
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).reshape(heads) for layer in (self.query, self.key, self.value)
        )
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        x = x + self.output(causal_attention(query, key, value).reshape(b, t, -1))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class NnxDecoder(nnx.Module):
    """Token ids ``[b, t]`` to logits ``[b, t, v]``."""

    def __init__(self, config: DecoderConfig, rank: int, dtype: Any, rngs: nnx.Rngs):
        v, d = config.vocab_size, config.hidden_size
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(v, d, **kinds)
        self.blocks = nnx.List(
            [Block(config, rank, dtype, rngs) for _ in range(config.num_layers)]
        )
        self.norm = nnx.RMSNorm(d, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(d, v, use_bias=False, **kinds)
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
