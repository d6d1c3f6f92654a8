"""Llama and the families that differ from it by a few fields.

Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 (a Llama), SmolLM3, Phi-3 and OLMo 2.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.rope import read_rope, rotated_dim
from lora_jax.models.family import Family, Fields

Config = Mapping[str, Any]


def read_sizes(
    fields: Fields,
    *,
    max_positions_default: int = 2048,
    mlp_size: str = "intermediate_size",
) -> dict[str, Any]:
    """Reads the `DecoderConfig` arguments that all Llama-like decoders share.

    Args:
      fields: the config.
      max_positions_default: the context if the file has none.
      mlp_size: the key of the width inside the MLP.
    """
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", hidden // max(heads, 1)),
        "mlp_size": fields.integer(mlp_size),
        "max_positions": fields.integer(
            "max_position_embeddings", max_positions_default
        ),
        "activation": fields.text("hidden_act", "silu"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "is_tied": fields.flag("tie_word_embeddings"),
    }


def finish(fields: Fields, arguments: dict[str, Any]) -> DecoderConfig:
    """Raises the collected faults, or builds the config."""
    fields.check()
    return DecoderConfig(**arguments)


def sliding_layers(
    fields: Fields, layers: int, slides: Any, window: int | None
) -> tuple[int | None, ...]:
    """Returns each layer's window: by ``layer_types`` if given, else ``slides(i)``."""
    kinds = fields.sequence("layer_types", layers)
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if wrong := sorted({str(kind) for kind in kinds if kind not in known}):
            fields.faults.append(f"layer_types must be of {known}; got {wrong}")
        return tuple(window if kind == known[1] else None for kind in kinds)
    return tuple(window if slides(i) else None for i in range(layers))


def plain_rope(fields: Fields, sizes: dict[str, Any], **options: Any) -> dict:
    """Returns one table of full rotation for all layers."""
    rope = read_rope(fields, sizes["head_dim"], **options)
    return {"ropes": (rope,), "layer_ropes": (0,) * sizes["num_layers"]}


def read_llama(config: Config) -> DecoderConfig:
    """Reads a Llama config (SmolLM2's too)."""
    fields = Fields(config, "Llama decoder")
    sizes = read_sizes(fields)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes)
        | {
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "has_mlp_bias": fields.flag("mlp_bias"),
        },
    )


def read_mistral(config: Config) -> DecoderConfig:
    """Reads a Mistral config: every layer has the sliding window."""
    fields = Fields(config, "Mistral decoder")
    sizes = read_sizes(fields, max_positions_default=131072)
    window = None
    if "sliding_window" not in config or config["sliding_window"] is not None:
        window = fields.integer("sliding_window", 4096)
    windows = (window,) * sizes["num_layers"]
    if config.get("num_key_value_heads") is None:
        sizes["num_kv_heads"] = 8
    return finish(
        fields, sizes | plain_rope(fields, sizes) | {"layer_windows": windows}
    )


def _qwen_windows(fields: Fields, sizes: dict[str, Any]) -> tuple[int | None, ...]:
    is_sliding = fields.flag("use_sliding_window")
    window = fields.integer("sliding_window", 4096) if is_sliding else None
    first = fields.integer("max_window_layers", 28)
    return sliding_layers(fields, sizes["num_layers"], lambda i: i >= first, window)


def read_qwen2(config: Config) -> DecoderConfig:
    """Reads a Qwen2 or Qwen2.5 config: biases on query, key and value."""
    fields = Fields(config, "Qwen2 decoder")
    sizes = read_sizes(fields, max_positions_default=32768)
    windows = _qwen_windows(fields, sizes)
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes)
        | {"has_qkv_bias": True, "layer_windows": windows},
    )


def read_qwen3(config: Config) -> DecoderConfig:
    """Reads a Qwen3 config: queries and keys are normalised per head."""
    fields = Fields(config, "Qwen3 decoder")
    sizes = read_sizes(fields, max_positions_default=32768)
    sizes["head_dim"] = fields.integer("head_dim", 128)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes)
        | {
            "qk_norm": "head",
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "layer_windows": _qwen_windows(fields, sizes),
        },
    )


def read_smollm3(config: Config) -> DecoderConfig:
    """Reads a SmolLM3 config: some layers have no rotary positions."""
    fields = Fields(config, "SmolLM3 decoder")
    sizes = read_sizes(fields, max_positions_default=32768)
    sizes["is_tied"] = fields.flag("tie_word_embeddings", True)
    layers = sizes["num_layers"]
    interval = max(fields.integer("no_rope_layer_interval", 4), 1)
    rotates = fields.sequence("no_rope_layers", layers)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(layers)]
    is_sliding = fields.flag("use_sliding_window")
    window = fields.integer("sliding_window", 4096) if is_sliding else None
    windows = sliding_layers(fields, layers, lambda i: not rotates[i], window)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | {
            "ropes": (read_rope(fields, sizes["head_dim"], default_theta=2e6),),
            "layer_ropes": tuple(0 if rotated else None for rotated in rotates),
            "layer_windows": windows,
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "has_mlp_bias": fields.flag("mlp_bias"),
        },
    )


def read_phi3(config: Config) -> DecoderConfig:
    """Reads a Phi-3 config: fused projections, partial rotation of each head."""
    fields = Fields(config, "Phi-3 decoder")
    sizes = read_sizes(fields, max_positions_default=4096)
    rope = read_rope(fields, rotated_dim(fields, sizes["head_dim"], 1.0))
    layers = sizes["num_layers"]
    window = fields.integer("sliding_window", None)
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "ropes": (rope,),
            "layer_ropes": (0,) * layers,
            "layer_windows": (window,) * layers,
            "is_qkv_fused": True,
            "is_gate_up_fused": True,
        },
    )


def read_olmo2(config: Config) -> DecoderConfig:
    """Reads an OLMo 2 config: post-norms, and normalised queries and keys."""
    fields = Fields(config, "OLMo 2 decoder")
    sizes = read_sizes(fields)
    sizes["norm_eps"] = fields.number("rms_norm_eps", 1e-5)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes)
        | {
            "qk_norm": "projection",
            "norm_placement": "post",
            "has_qkv_bias": bias,
            "has_output_bias": bias,
        },
    )


def token_inputs(config: Any) -> tuple[Any, ...]:
    """Returns the shape of one batch of token ids."""
    del config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def decoder_family(
    read_config: Any,
    modules: Mapping[str, str],
    *,
    prefix: str = "model.",
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",),
    **options: Any,
) -> Family:
    """Makes a family of `Decoder`; the arguments are `Family`'s."""
    return Family(
        read_config=read_config,
        module=Decoder,
        inputs=token_inputs,
        modules=modules,
        prefix=prefix,
        prefixes=("model.language_model.", "language_model.model."),  # of a tower
        unused=(r"lm_head\.", *unused),  # a stray copy, where the head is tied
        **options,
    )


LAYER = "layers.{i}."
SHARED = {
    "embed": "embed_tokens",
    "layer_{i}/attention/query": LAYER + "self_attn.q_proj",
    "layer_{i}/attention/key": LAYER + "self_attn.k_proj",
    "layer_{i}/attention/value": LAYER + "self_attn.v_proj",
    "layer_{i}/attention/output": LAYER + "self_attn.o_proj",
    "layer_{i}/attention/query_norm": LAYER + "self_attn.q_norm",
    "layer_{i}/attention/key_norm": LAYER + "self_attn.k_norm",
    "layer_{i}/mlp/gate": LAYER + "mlp.gate_proj",
    "layer_{i}/mlp/up": LAYER + "mlp.up_proj",
    "layer_{i}/mlp/down": LAYER + "mlp.down_proj",
    "final_norm": "norm",
    "head": "lm_head",
}
PRE_NORMS = {
    "layer_{i}/attention_norm": LAYER + "input_layernorm",
    "layer_{i}/mlp_norm": LAYER + "post_attention_layernorm",
}
FUSED = {
    "layer_{i}/attention/qkv": LAYER + "self_attn.qkv_proj",
    "layer_{i}/mlp/gate_up": LAYER + "mlp.gate_up_proj",
}
POST_NORMS = {
    "layer_{i}/attention_post_norm": LAYER + "post_attention_layernorm",
    "layer_{i}/mlp_post_norm": LAYER + "post_feedforward_layernorm",
}

LLAMA = decoder_family(read_llama, SHARED | PRE_NORMS)
MISTRAL = decoder_family(read_mistral, SHARED | PRE_NORMS)
QWEN2 = decoder_family(read_qwen2, SHARED | PRE_NORMS)
QWEN3 = decoder_family(read_qwen3, SHARED | PRE_NORMS)
SMOLLM3 = decoder_family(read_smollm3, SHARED | PRE_NORMS)
PHI3 = decoder_family(read_phi3, SHARED | PRE_NORMS | FUSED)
OLMO2 = decoder_family(read_olmo2, SHARED | POST_NORMS)
