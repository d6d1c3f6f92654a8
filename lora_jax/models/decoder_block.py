"""The parts of a decoder: norms, attention, MLP and the block they make."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lora_jax.attention.causal import (
    bidirectional_attention,
    cached_attention,
    causal_attention,
    write_slots,
)
from lora_jax.attention.rope import apply_rope, pairs_to_halves
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.experts import Mixture
from lora_jax.names import LINEAR
from lora_jax.nn.layer_rules import register_layer
from lora_jax.parallel.activation_sharding import shard_rows

Hidden = Float[Array, "b t d"]
Layer = int | Int[Array, ""]
Past = Any  # keys and values; () of a layer without its own; None
NO_WINDOW = 2**30


class PositionContext(NamedTuple):
    """Positions of a batch's tokens, shared by all layers.

    Attributes:
      cos: cosines of each rope table, ``[b, t, c]``.
      sin: sines.
      growth: ``[b, t]`` factors of the queries, or None.
      own: ``[b, t, l, p]`` what each layer reads of the tokens directly, or None.
      given: keys and values of another layer, for one without its own.
      slots: ``[b, t]`` slots in the cache when decoding, else None.
      segment_ids: ``[b, t]`` example of each token in a packed row, or None.
    """

    cos: tuple[Array, ...]
    sin: tuple[Array, ...]
    growth: Array | None
    slots: Array | None
    segment_ids: Array | None
    own: Array | None = None
    given: Any = None


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

        The result is named `LINEAR`, so that a remat policy can save it.
        """
        layer = nn.Dense(width, use_bias=use_bias, dtype=self.dtype, name=name)
        return checkpoint_name(layer(x), LINEAR)

    def norm(self, name: str) -> nn.Module:
        """Returns the norm ``name``."""
        return make_norm(self.config, self.dtype, name)


class Attention(DecoderModule):
    """Causal self-attention, grouped, with rotary positions."""

    @nn.compact
    def __call__(
        self, x: Hidden, place: PositionContext, layer: Layer, past: Past = None
    ) -> tuple[Hidden, Past]:
        """Applies attention to ``[b, t, d]``.

        Args:
          x: ``[b, t, d]``.
          place: the tokens' positions.
          layer: the layer's number, traced if the layers are scanned.
          past: the layer's keys and values ``[b, k, s, h]`` when decoding.

        Returns:
          ``[b, t, d]``, and the layer's keys and values including these tokens'.
        """
        cfg, (b, t, _) = self.config, x.shape
        n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

        query, key, value = self._projected(x)

        def placed(y: Array, name: str, heads: int) -> Array:
            y = self.norm(name)(y) if cfg.qk_norm == "projection" else y
            y = _clipped(y, cfg.qkv_clip).reshape(b, t, heads, h)
            y = self.norm(name)(y) if cfg.qk_norm == "head" else y
            return self._rotated(y, place, layer)

        query = placed(query, "query_norm", n)
        if key is None:
            key, value = place.given
        else:
            key = placed(key, "key_norm", k)
            value = _clipped(value, cfg.qkv_clip).reshape(b, t, k, h)
            value = unit_rms(value, cfg.norm_eps) if cfg.has_value_norm else value
        if place.growth is not None:
            query = query * place.growth[..., None, None].astype(query.dtype)

        if cfg.divides_by_layer:
            query = query / jnp.asarray(layer + 1, query.dtype)
        window = _of_layer(cfg.layer_windows, layer, NO_WINDOW)
        sinks = None
        if cfg.has_sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (n,))
        attend = functools.partial(
            causal_attention if past is None else cached_attention,
            scale=cfg.attention_scale,
            softcap=cfg.attention_softcap,
            window=window,
            sinks=sinks,
        )
        if not cfg.is_causal:
            mixed = bidirectional_attention(
                *(query, key, value),
                segment_ids=place.segment_ids,
                scale=cfg.attention_scale,
                window=window,
            )
        elif past is None:
            windows = {NO_WINDOW if w is None else w for w in cfg.layer_windows}
            mixed = attend(
                query,
                key,
                value,
                windows=tuple(sorted(windows)),
                segment_ids=place.segment_ids,
            )
        else:
            if cfg.key_source is None:
                key = write_slots(past[0], key, place.slots)
                value = write_slots(past[1], value, place.slots)
            mixed = attend(query, key, value, place.slots)
        mixed = mixed.reshape(b, t, n * h)
        y = self.dense("output", mixed, cfg.hidden_size, cfg.has_output_bias)
        return y, (key, value) if cfg.key_source is None else ()

    def _projected(self, x: Hidden) -> tuple[Array, Any, Any]:
        """Queries, keys and values ``[b, t, n h]``; the latter None if another's."""
        cfg, bias = self.config, self.config.has_qkv_bias
        queries, keys = (i * cfg.head_dim for i in (cfg.num_heads, cfg.num_kv_heads))
        if cfg.is_qkv_fused:
            qkv = self.dense("qkv", x, queries + 2 * keys, bias)
            query, key, value = jnp.split(qkv, [queries, queries + keys], axis=-1)
            return query, key, value
        query = self.dense("query", x, queries, bias)
        if cfg.key_source is not None:
            return query, None, None
        key = self.dense("key", x, keys, bias)
        if cfg.value_is_key:
            return query, key, key
        return query, key, self.dense("value", x, keys, bias)

    def _rotated(self, x: Array, place: PositionContext, layer: Layer) -> Array:
        """Queries or keys ``[b, t, n, h]``, rotated to their positions."""
        cfg = self.config
        rope = _of_layer(cfg.layer_ropes, layer, len(cfg.ropes))
        if rope is None:
            return x
        cos, sin = (_pick(tables, rope) for tables in (place.cos, place.sin))
        if cfg.rotates_pairs:  # the scores don't depend on the dimensions' order
            x = pairs_to_halves(x, cos.shape[-1])
        return apply_rope(x, cos, sin)


class Mlp(DecoderModule):
    """Computes ``(act(x W_gate) * x W_up) W_down``, or ``act(x W_up) W_down``."""

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        cfg, act = self.config, ACTIVATIONS[self.config.activation]
        f, bias = cfg.mlp_size, cfg.has_mlp_bias

        if cfg.is_gate_up_fused:
            both = self.dense("gate_up", x, 2 * f, bias)
            x = gate(act, *jnp.split(both, 2, axis=-1))  # [b, t, f]
        elif cfg.is_gated:
            x = gate(act, self.dense("gate", x, f, bias), self.dense("up", x, f, bias))
        else:
            x = jax.checkpoint(act)(self.dense("up", x, f, bias))
        return self.dense("down", x, cfg.hidden_size, bias)


class Block(DecoderModule):
    """One transformer block: ``x + post(sublayer(pre(x)))``, twice.

    Parallel: ``x + attention(pre(x)) + mlp(pre(x))``.
    """

    def __call__(
        self, x: Hidden, place: PositionContext, layer: Layer
    ) -> tuple[Hidden, Past]:
        """Returns ``[b, t, d]`` for ``[b, t, d]``, and what a later layer needs."""
        x, kept = self.run(x, place, layer)
        return x, kept if self.config.is_key_source else None

    @nn.compact
    def run(
        self, x: Hidden, place: PositionContext, layer: Layer, past: Past = None
    ) -> tuple[Hidden, Past]:
        """Like `__call__`, and returns the layer's keys and values for a cache."""
        placement, scale = self.config.norm_placement, self.config.residual_scale

        def pre(name: str, x: Array) -> Array:
            return self.norm(name)(x) if placement != "post" else x

        def post(name: str, y: Array) -> Array:
            y = self.norm(name)(y) if placement != "pre" else y
            return y if scale == 1 else y * scale

        attention = Attention(self.config, self.dtype, name="attention")
        mlp = make_mlp(self.config, self.dtype, layer)
        inputs = pre("attention_norm", x)
        y, kept = attention(inputs, place, layer, past)
        if self.config.is_parallel:
            return shard_rows(x + scale * (y + mlp(inputs))), kept
        x = x + post("attention_post_norm", y)
        x = x + post("mlp_post_norm", mlp(pre("mlp_norm", x)))
        if place.own is not None:
            x = x + self._from_own(x, place.own[:, :, layer])
        if self.config.has_layer_scale:
            x = x * self.param("layer_scale", nn.initializers.ones, (1,)).astype(
                x.dtype
            )
        return shard_rows(x), kept

    def _from_own(self, x: Hidden, own: Array) -> Hidden:
        """What the layer's own ``[b, t, p]`` adds, gated by ``x``."""
        cfg, act = self.config, ACTIVATIONS[self.config.activation]
        gated = gate(act, self.dense("own_gate", x, own.shape[-1], False), own)
        return self.norm("own_norm")(
            self.dense("own_up", gated, cfg.hidden_size, False)
        )


def make_mlp(config: DecoderConfig, dtype: Any, layer: Layer) -> nn.Module:
    """Makes the MLP of a layer, or its mixture of experts."""
    experts = config.experts
    if experts is None or layer in experts.dense_layers:
        return Mlp(config, dtype, name="mlp")
    return Mixture(experts, config.activation, dtype, name="mlp")


def make_norm(config: DecoderConfig, dtype: Any, name: str | None) -> nn.Module:
    """Makes a norm of the config's type."""
    if config.norm == "layer":
        bias = config.has_norm_bias
        return nn.LayerNorm(config.norm_eps, dtype=dtype, use_bias=bias, name=name)
    return RMSNorm(config.norm_eps, config.norm_offset, dtype, name=name)


def _of_layer(values: tuple, layer: Layer, instead_of_none: int) -> Any:
    """Returns a layer's entry: static if possible, else indexed by the traced layer."""
    if len(set(values)) == 1:
        return values[0]
    if isinstance(layer, int):
        return values[layer]
    return jnp.asarray([instead_of_none if v is None else v for v in values])[layer]


def _clipped(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)


def _pick(tables: tuple[Array, ...], index: Any) -> Array:
    return tables[index] if isinstance(index, int) else jnp.stack(tables)[index]
