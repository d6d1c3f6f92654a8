"""OLMo 3, Ministral 3, GLM-4, Granite and Cohere 2: dense decoders of 2024 and 2025."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.llama import (
    FUSED,
    LAYER,
    POST_NORMS,
    PRE_NORMS,
    SHARED,
    decoder_family,
    finish,
    plain_rope,
    read_sizes,
    sliding_layers,
)
from lora_jax.models.families.rope import read_rope, read_ropes, rotated_dim
from lora_jax.models.family import Fields

Config = Mapping[str, Any]
# Ministral 3's defaults if its config has no rope_parameters.
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _window(fields: Fields, default: int | None) -> int | None:
    """Returns a window: the default if the key is absent, None if it is null."""
    if fields.config.get("sliding_window", default) is None:
        return None
    return fields.integer("sliding_window", default)


def read_olmo3(config: Config) -> DecoderConfig:
    """Reads an OLMo 3 config: an OLMo 2 with windows, whose RoPE isn't stretched."""
    fields = Fields(config, "OLMo 3 decoder")
    sizes = read_sizes(fields)
    windows = sliding_layers(
        fields, sizes["num_layers"], lambda i: (i + 1) % 4 != 0, _window(fields, 4096)
    )
    theta = fields.number("rope_theta", 5e5)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "qk_norm": "projection",
            "norm_placement": "post",
            "ropes": read_ropes(
                fields, sizes["head_dim"], theta=theta, local_theta=theta
            ),
            "layer_ropes": tuple(0 if w is None else 1 for w in windows),
            "layer_windows": windows,
            "has_qkv_bias": bias,
            "has_output_bias": bias,
        },
    )


def read_ministral3(config: Config) -> DecoderConfig:
    """Reads a Ministral 3 config: YaRN, and queries that grow with their position."""
    fields = Fields(config, "Ministral 3 decoder")
    sizes = read_sizes(fields, max_positions_default=262144)
    rope = fields.mapping("rope_parameters") or MINISTRAL3_ROPE
    own = Fields(rope, fields.what)
    beta = own.number("llama_4_scaling_beta", 0.0)
    unit = own.integer("original_max_position_embeddings", 1)
    fields.faults += own.faults
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "head_dim": fields.integer("head_dim", 128),
            "ropes": (read_rope(fields, sizes["head_dim"], settings=rope),),
            "layer_ropes": (0,) * sizes["num_layers"],
            "layer_windows": (_window(fields, None),) * sizes["num_layers"],
            "query_growth": (beta, max(unit, 1)) if beta else None,
        },
    )


def read_glm4(config: Config) -> DecoderConfig:
    """Reads a GLM-4 config: four block norms, half of each head rotated in pairs."""
    fields = Fields(config, "GLM-4 decoder")
    sizes = read_sizes(fields, max_positions_default=131072)
    sizes["head_dim"] = fields.integer("head_dim", 128)
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1.5625e-07),
            "norm_placement": "both",
            "ropes": (read_rope(fields, rotated_dim(fields, sizes["head_dim"], 0.5)),),
            "layer_ropes": (0,) * sizes["num_layers"],
            "rotates_pairs": True,
            "has_qkv_bias": fields.flag("attention_bias", True),
            "is_gate_up_fused": True,
        },
    )


def read_granite(config: Config) -> DecoderConfig:
    """Reads a Granite config: a Llama with four multipliers."""
    fields = Fields(config, "Granite decoder")
    sizes = read_sizes(fields)
    bias = fields.flag("attention_bias")
    scaling = fields.number("logits_scaling", 1.0)
    if scaling <= 0:
        fields.faults.append(f"logits_scaling must be above 0; got {scaling}")
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes)
        | {
            "attention_scale": fields.number("attention_multiplier", 1.0),
            "embed_scale": fields.number("embedding_multiplier", 1.0),
            "residual_scale": fields.number("residual_multiplier", 1.0),
            "logit_scale": 1 / scaling if scaling > 0 else 1.0,
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "has_mlp_bias": fields.flag("mlp_bias"),
        },
    )


def read_cohere2(config: Config) -> DecoderConfig:
    """Reads a Cohere 2 config: parallel blocks; layers with a window are rotated."""
    fields = Fields(config, "Cohere 2 decoder")
    sizes = read_sizes(fields, max_positions_default=8192)
    heads = max(sizes["num_heads"], 1)
    sizes["head_dim"] = sizes["hidden_size"] // heads  # whatever the file says
    pattern = max(fields.integer("sliding_window_pattern", 4), 1)
    windows = sliding_layers(
        fields,
        sizes["num_layers"],
        lambda i: (i + 1) % pattern != 0,
        _window(fields, 4096),
    )
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | {
            "norm": "layer",
            "norm_eps": fields.number("layer_norm_eps", 1e-5),
            "has_norm_bias": False,
            "is_parallel": True,
            "ropes": (read_rope(fields, sizes["head_dim"]),),
            "layer_ropes": tuple(None if w is None else 0 for w in windows),
            "layer_windows": windows,
            "rotates_pairs": True,
            "logit_scale": fields.number("logit_scale", 0.0625),
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "is_tied": fields.flag("tie_word_embeddings", True),
        },
    )


OLMO3 = decoder_family(read_olmo3, SHARED | POST_NORMS)
MINISTRAL3 = decoder_family(read_ministral3, SHARED | PRE_NORMS)
GLM4 = decoder_family(
    read_glm4,
    SHARED
    | PRE_NORMS
    | {
        "layer_{i}/mlp/gate_up": FUSED["layer_{i}/mlp/gate_up"],
        "layer_{i}/attention_post_norm": LAYER + "post_self_attn_layernorm",
        "layer_{i}/mlp_post_norm": LAYER + "post_mlp_layernorm",
    },
)
GRANITE = decoder_family(read_granite, SHARED | PRE_NORMS)
COHERE2 = decoder_family(
    read_cohere2, SHARED | {"layer_{i}/attention_norm": LAYER + "input_layernorm"}
)
