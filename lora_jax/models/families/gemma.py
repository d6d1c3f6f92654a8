"""Gemma 2 and the text model of Gemma 3: four norms per block, alternating windows."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.llama import (
    LAYER,
    POST_NORMS,
    SHARED,
    decoder_family,
    finish,
    read_sizes,
    sliding_layers,
)
from lora_jax.models.families.rope import read_rope, read_ropes
from lora_jax.models.family import Fields


def _read_common(fields: Fields, max_positions: int) -> dict[str, Any]:
    sizes = read_sizes(fields, max_positions_default=max_positions)
    bias = fields.flag("attention_bias")
    return sizes | {
        "head_dim": fields.integer("head_dim", 256),
        "activation": fields.text("hidden_activation", "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "norm_placement": "both",
        "has_qkv_bias": bias,
        "has_output_bias": bias,
        "attention_scale": max(fields.number("query_pre_attn_scalar", 256), 0.1)
        ** -0.5,
        "embed_scale": max(sizes["hidden_size"], 1) ** 0.5,
        "is_tied": fields.flag("tie_word_embeddings", True),
    }


def soft_cap(fields: Fields, key: str, default: float | None) -> float | None:
    """Returns a soft-cap: the default if the key is absent, none if it is null."""
    if key in fields.config and fields.config[key] is None:
        return None
    return fields.number(key, default)


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Gemma 2 config: soft-caps, and a window in every other layer."""
    fields = Fields(config, "Gemma 2 decoder")
    common = _read_common(fields, 8192)
    fields.only("use_bidirectional_attention", False)
    layers = common["num_layers"]
    window = fields.integer("sliding_window", 4096)
    windows = sliding_layers(fields, layers, lambda i: i % 2 == 0, window)
    return finish(
        fields,
        common
        | {
            "ropes": (read_rope(fields, common["head_dim"]),),
            "layer_ropes": (0,) * layers,
            "layer_windows": windows,
            "attention_softcap": soft_cap(fields, "attn_logit_softcapping", 50.0),
            "final_softcap": soft_cap(fields, "final_logit_softcapping", 30.0),
        },
    )


def read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Gemma 3 text config: local and global layers with their own RoPE.

    EmbeddingGemma's reads both ways; its window is half on either side.
    """
    fields = Fields(config, "Gemma 3 text decoder")
    common = _read_common(fields, 131072)
    layers = common["num_layers"]
    window = fields.integer("sliding_window", 4096)
    is_causal = not fields.flag("use_bidirectional_attention")
    window = window if is_causal else window // 2 + 1
    pattern = max(fields.integer("sliding_window_pattern", 6), 1)
    windows = sliding_layers(fields, layers, lambda i: (i + 1) % pattern != 0, window)
    ropes = read_ropes(
        fields,
        common["head_dim"],
        theta=fields.number("rope_theta", 1e6),
        local_theta=fields.number("rope_local_base_freq", 10000.0),
    )
    return finish(
        fields,
        common
        | {
            "qk_norm": "head",
            "ropes": ropes,
            "layer_ropes": tuple(0 if w is None else 1 for w in windows),
            "layer_windows": windows,
            "is_causal": is_causal,
            "final_softcap": soft_cap(fields, "final_logit_softcapping", None),
        },
    )


MODULES = (
    SHARED
    | POST_NORMS
    | {
        "layer_{i}/attention_norm": LAYER + "input_layernorm",
        "layer_{i}/mlp_norm": LAYER + "pre_feedforward_layernorm",
    }
)
GEMMA2 = decoder_family(read_gemma2, MODULES)
GEMMA3 = decoder_family(read_gemma3, MODULES)
