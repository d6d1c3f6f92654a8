"""The parts of a decoder: attention, MLP and the block they make."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax.attention.causal import (
    bidirectional_attention,
    cached_attention,
    causal_attention,
    write_slots,
)
from lora_jax.attention.rope import apply_rope, pairs_to_halves
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.cache import KeysValues
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.decoder_parts import (
    DecoderModule,
    Hidden,
    Layer,
    Past,
    PositionContext,
    unit_rms,
)
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.experts import Mixture, Stacks
from lora_jax.models.mixer_config import DeltaNetConfig, ShortConvConfig
from lora_jax.models.recurrent import DeltaNet, ShortConv
from lora_jax.parallel.activation_sharding import shard_rows

NO_WINDOW = 2**30


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
          past: the layer's `KeysValues` when decoding.

        Returns:
          ``[b, t, d]``, and the layer's keys and values including these tokens'.
        """
        cfg, (b, t, _) = self.config, x.shape
        n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

        query, key, value = self._projected(x)
        opening = None
        if cfg.has_output_gate:
            query, opening = jnp.split(query.reshape(b, t, n, 2 * h), 2, axis=-1)

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
                place=place.order,
            )
        else:
            if cfg.key_source is None:
                key = write_slots(past.keys, key, place.slots)
                value = write_slots(past.values, value, place.slots)
            mixed = attend(query, key, value, place.slots)
        if opening is not None:
            mixed = mixed * nn.sigmoid(opening)
        mixed = mixed.reshape(b, t, n * h)
        y = self.dense("output", mixed, cfg.hidden_size, cfg.has_output_bias)
        return y, KeysValues(key, value) if cfg.key_source is None else ()

    def _projected(self, x: Hidden) -> tuple[Array, Any, Any]:
        """Queries, keys and values ``[b, t, n h]``; the latter None if another's.

        Queries are followed by their gate, head by head, if there is one.
        """
        cfg, bias = self.config, self.config.has_qkv_bias
        queries, keys = (i * cfg.head_dim for i in (cfg.num_heads, cfg.num_kv_heads))
        if cfg.is_qkv_fused:
            qkv = self.dense("qkv", x, queries + 2 * keys, bias)
            query, key, value = jnp.split(qkv, [queries, queries + keys], axis=-1)
            return query, key, value
        doubled = queries * (2 if cfg.has_output_gate else 1)
        query = self.dense("query", x, doubled, bias)
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
        """Like `__call__`, and returns what the layer's mixer keeps, for a cache."""
        placement, scale = self.config.norm_placement, self.config.residual_scale

        def pre(name: str, x: Array) -> Array:
            return self.norm(name)(x) if placement != "post" else x

        def post(name: str, y: Array) -> Array:
            y = self.norm(name)(y) if placement != "pre" else y
            return y if scale == 1 else y * scale

        mixer = make_mixer(self.config, self.dtype)
        step = layer // (self.config.scan_period or 1)
        stacks = place.stacks and place.stacks._replace(step=step)
        mlp = make_mlp(self.config, self.dtype, layer, stacks)
        inputs = pre("attention_norm", x)
        y, kept = mixer(inputs, place, layer, past)
        if self.config.is_parallel:
            return shard_rows(x + scale * (y + mlp(inputs))), kept
        x = x + post("attention_post_norm", y)
        y, experts = mlp(pre("mlp_norm", x)), self.config.experts
        if experts is not None and experts.is_beside_mlp:
            y = self.norm("mlp_own_norm")(y) + self._mixture(experts, x, stacks)
        x = x + post("mlp_post_norm", y)
        if place.own is not None:
            x = x + self._from_own(x, place.own[:, :, layer])
        if self.config.has_layer_scale:
            x = x * self.param("layer_scale", nn.initializers.ones, (1,)).astype(
                x.dtype
            )
        return shard_rows(x), kept

    def _mixture(
        self, experts: ExpertConfig, x: Hidden, stacks: Stacks | None
    ) -> Hidden:
        """What experts beside the MLP add; their router reads ``x`` before its norm."""
        cfg = self.config
        mixture = Mixture(experts, cfg.activation, self.dtype, name="mixture")
        read = unit_rms(x, cfg.norm_eps)
        y = mixture(self.norm("mixture_norm")(x), read, stacks)
        return self.norm("mixture_post_norm")(y)

    def _from_own(self, x: Hidden, own: Array) -> Hidden:
        """What the layer's own ``[b, t, p]`` adds, gated by ``x``."""
        cfg, act = self.config, ACTIVATIONS[self.config.activation]
        gated = gate(act, self.dense("own_gate", x, own.shape[-1], False), own)
        return self.norm("own_norm")(
            self.dense("own_up", gated, cfg.hidden_size, False)
        )


class Period(nn.Module):
    """The layers that repeat in a hybrid: one step of its scan.

    Attributes:
      config: of the whole decoder.
      dtype: dtype of the computation.
      block: makes a layer.

    Variables: those of ``p`` layers, under ``0_of_p`` to ``{p - 1}_of_p``.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    block: Any = Block

    def setup(self) -> None:
        """Creates the layers."""
        for j, name in enumerate(self._names()):
            setattr(self, name, self.block(self.config.of_layer(j), self.dtype))

    def __call__(
        self, x: Hidden, place: PositionContext, number: Layer
    ) -> tuple[Hidden, None]:
        """Returns ``[b, t, d]`` for ``[b, t, d]``; ``number`` is the period's."""
        names = self._names()
        for j, name in enumerate(names):
            x, _ = getattr(self, name)(x, place, number * len(names) + j)
        return x, None

    def run(
        self, x: Hidden, place: PositionContext, number: Layer, past: Past = None
    ) -> tuple[Hidden, Past]:
        """Like `__call__`, and returns what each layer keeps."""
        names, kept = self._names(), []
        for j, name in enumerate(names):
            own = None if past is None else past[j]
            x, new = getattr(self, name).run(x, place, number * len(names) + j, own)
            kept.append(new)
        return x, tuple(kept)

    def _names(self) -> list[str]:
        period = self.config.scan_period or 1
        return [f"{j}_of_{period}" for j in range(period)]


MIXERS = {  # by the type of `DecoderConfig.mixer`
    type(None): ("attention", Attention),
    DeltaNetConfig: ("delta_net", DeltaNet),
    ShortConvConfig: ("short_conv", ShortConv),
}


def make_mixer(config: DecoderConfig, dtype: Any) -> nn.Module:
    """Makes what mixes the tokens in a layer: attention, or `DecoderConfig.mixer`."""
    name, kind = MIXERS[type(config.mixer)]
    return kind(config, dtype, name=name)


def make_mlp(
    config: DecoderConfig, dtype: Any, layer: Layer, stacks: Stacks | None
) -> Callable[[Hidden], Hidden]:
    """Makes the MLP of a layer, or its mixture of experts."""
    experts = config.experts
    if experts is None or experts.is_beside_mlp or layer in experts.dense_layers:
        return Mlp(config, dtype, name="mlp")
    mixture = Mixture(experts, config.activation, dtype, name="mlp")
    return functools.partial(mixture, stacks=stacks)


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
