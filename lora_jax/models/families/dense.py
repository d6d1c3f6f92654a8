"""OLMo 3, Ministral 3, GLM-4, Granite and Cohere 2: dense decoders of 2024 and 2025."""

from lora_jax.models.families.llama import (
    FUSED,
    LAYER,
    POST_NORMS,
    PRE_NORMS,
    SHARED,
    Sizes,
    attention_biases,
    decoder_family,
    decoder_reader,
    every,
    one_rope,
    sliding_layers,
    two_ropes,
    window_or_none,
)
from lora_jax.models.families.rope import read_rope, read_ropes, rotated_dim
from lora_jax.models.fields import Fields

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


@decoder_reader("OLMo 3", rms_norm_eps=1e-5, sliding_window=4096, rope_theta=5e5)
def read_olmo3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads an OLMo 3 config: an OLMo 2 with windows, whose RoPE isn't stretched."""
    window = window_or_none(fields)
    windows = sliding_layers(fields, sizes["num_layers"], every(4), window)
    theta = fields.number("rope_theta")
    ropes = read_ropes(fields, sizes["head_dim"], theta=theta, local_theta=theta)
    return {
        **attention_biases(fields),
        **two_ropes(ropes, windows),
        "qk_norm": "projection",
        "norm_placement": "post",
    }


@decoder_reader(
    "Ministral 3", max_position_embeddings=262144, rms_norm_eps=1e-5, head_dim=128
)
def read_ministral3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Ministral 3 config: YaRN, and queries that grow with their position."""
    settings = fields.mapping("rope_parameters") or MINISTRAL3_ROPE
    own = fields.nested(settings)
    beta = own.number("llama_4_scaling_beta", 0.0)
    unit = own.integer("original_max_position_embeddings", 1)
    return {
        "ropes": (read_rope(fields, sizes["head_dim"], settings),),
        "layer_ropes": (0,) * sizes["num_layers"],
        "layer_windows": (window_or_none(fields),) * sizes["num_layers"],
        "query_growth": (beta, max(unit, 1)) if beta else None,
    }


@decoder_reader(
    "GLM-4",
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-07,
    head_dim=128,
    attention_bias=True,
)
def read_glm4(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a GLM-4 config: four block norms, half of each head rotated in pairs."""
    rotary_dim = rotated_dim(fields, sizes["head_dim"], 0.5)
    return one_rope(fields, sizes, rotary_dim) | {
        "norm_placement": "both",
        "rotates_pairs": True,
        "has_qkv_bias": fields.flag("attention_bias"),
        "is_gate_up_fused": True,
    }


@decoder_reader("Granite")
def read_granite(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Granite config: a Llama with four multipliers."""
    del sizes
    scaling = fields.number("logits_scaling", 1.0)
    if scaling <= 0:
        fields.faults.append(f"logits_scaling must be above 0; got {scaling}")
    return attention_biases(fields) | {
        "attention_scale": fields.number("attention_multiplier", 1.0),
        "embed_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "logit_scale": 1 / scaling if scaling > 0 else 1.0,
        "has_mlp_bias": fields.flag("mlp_bias"),
    }


@decoder_reader(
    "Cohere 2",
    max_position_embeddings=8192,
    sliding_window=4096,
    tie_word_embeddings=True,
)
def read_cohere2(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Cohere 2 config: parallel blocks; layers with a window are rotated."""
    head_dim = sizes["hidden_size"] // max(sizes["num_heads"], 1)  # not the file's
    pattern = max(fields.integer("sliding_window_pattern", 4), 1)
    window = window_or_none(fields)
    windows = sliding_layers(fields, sizes["num_layers"], every(pattern), window)
    return {
        **attention_biases(fields),
        **one_rope(fields, sizes, head_dim),
        "head_dim": head_dim,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_eps", 1e-5),
        "has_norm_bias": False,
        "is_parallel": True,
        "layer_ropes": tuple(None if w is None else 0 for w in windows),
        "layer_windows": windows,
        "rotates_pairs": True,
        "logit_scale": fields.number("logit_scale", 0.0625),
    }


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
