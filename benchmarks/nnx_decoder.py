"""The decoder of `benchmarks.contenders` written for flax NNX.

Written as an NNX user would, except that it uses this library's faster attention and
its norm, and names what rematerialisation may keep. With ``rank`` its linears are in
`nnx.LoRA`; without, they are plain, for `lora_jax.nnx.adapt` (in scanned blocks) and
for qwix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.attention.causal import causal_attention
from lora_jax.attention.rope import apply_rope, rope_angles
from lora_jax.models.decoder import REMATS
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.decoder_parts import unit_rms
from lora_jax.names import LINEAR


def lora_linear(i: int, o: int, rank: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LoRA:
    """Makes an `nnx.LoRA` around an `nnx.Linear` ``[i, o]`` without bias."""
    base = linear(i, o, dtype, rngs)
    return nnx.LoRA(i, rank, o, base_module=base, dtype=dtype, rngs=rngs)


def linear(i: int, o: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes an `nnx.Linear` ``[i, o]`` without bias."""
    return nnx.Linear(i, o, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)


class RMSNorm(nnx.Module):
    """The norm of `lora_jax.models.decoder`.

    `flax.nnx.RMSNorm` multiplies the scale by ``1 / √(mean(x²) + eps)`` first, an array
    as large as ``x``.
    """

    def __init__(self, config: DecoderConfig, dtype: Any):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised ``x``."""
        y = unit_rms(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Block(nnx.Module):
    """Attention and gated MLP."""

    def __init__(
        self, config: DecoderConfig, rank: int | None, dtype: Any, rngs: nnx.Rngs
    ):
        d, f = config.hidden_size, config.mlp_size
        q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        sizes = {
            **{"query": (d, q), "key": (d, kv), "value": (d, kv), "output": (q, d)},
            **{"gate": (d, f), "up": (d, f), "down": (f, d)},
        }
        for name, (i, o) in sizes.items():
            layer = (
                linear(i, o, dtype, rngs)
                if rank is None
                else lora_linear(i, o, rank, dtype, rngs)
            )
            setattr(self, name, layer)
        self.attention_norm, self.mlp_norm = (RMSNorm(config, dtype) for _ in range(2))
        self.config = config

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""

        def apply(name: str, x: jax.Array) -> jax.Array:
            return checkpoint_name(getattr(self, name)(x), LINEAR)

        b, t, _ = x.shape
        heads = (b, t, -1, self.config.head_dim)
        y = self.attention_norm(x)
        query, key, value = (
            apply(name, y).reshape(heads) for name in ("query", "key", "value")
        )
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        attended = causal_attention(query, key, value).reshape(b, t, -1)
        x = x + apply("output", attended)
        y = self.mlp_norm(x)
        return x + apply("down", nnx.silu(apply("gate", y)) * apply("up", y))


class NnxDecoder(nnx.Module):
    """Token ids ``[b, t]`` to logits ``[b, t, v]``."""

    def __init__(
        self,
        config: DecoderConfig,
        rank: int | None,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        is_scanned: bool = False,
    ):
        v, d, n = config.vocab_size, config.hidden_size, config.num_layers
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(v, d, **kinds)
        if is_scanned:
            make = nnx.vmap(lambda rngs: Block(config, rank, dtype, rngs))
            self.blocks = nnx.split_rngs(splits=n)(make)(rngs)
        else:
            self.blocks = nnx.List([Block(config, rank, dtype, rngs) for _ in range(n)])
        self.norm = RMSNorm(config, dtype)
        self.head = nnx.Linear(d, v, use_bias=False, **kinds)
        self.config = config

    def hidden(self, ids: jax.Array, *_: None) -> jax.Array:
        """Returns what the head is applied to, ``[b, t, d]``."""
        (rope,) = self.config.ropes
        positions = jnp.arange(ids.shape[1])[None]
        angles = rope_angles(positions, jnp.asarray(rope.frequencies()))
        x, cos, sin = self.embed(ids), jnp.cos(angles), jnp.sin(angles)
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x, cos, sin)
            return self.norm(x)

        @nnx.scan(in_axes=(nnx.Carry, 0, None, None), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False, policy=REMATS["lora"])
        def run(x, block, cos, sin):
            return block(x, cos, sin)

        return self.norm(run(x, self.blocks, cos, sin))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns the logits."""
        return self.head(self.hidden(ids))
