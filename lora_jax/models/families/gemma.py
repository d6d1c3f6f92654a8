"""Gemma 2 and the text model of Gemma 3: four norms per block, alternating windows."""

from lora_jax.models.families.llama import (
    LAYER,
    POST_NORMS,
    SHARED,
    Sizes,
    attention_biases,
    decoder_family,
    decoder_reader,
    every,
    sliding_layers,
    two_ropes,
)
from lora_jax.models.families.rope import read_ropes
from lora_jax.models.fields import Fields

GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def _common(fields: Fields, sizes: Sizes) -> Sizes:
    scale = max(fields.number("query_pre_attn_scalar", 256), 0.1)
    return attention_biases(fields) | {
        "activation": fields.text("hidden_activation"),
        "norm_offset": 1.0,
        "norm_placement": "both",
        "attention_scale": scale**-0.5,
        "embed_scale": max(sizes["hidden_size"], 1) ** 0.5,
    }


def soft_cap(fields: Fields, key: str, default: float | None) -> float | None:
    """Returns a soft-cap: the default if the key is absent, none if it is null."""
    return None if fields.is_null(key) else fields.number(key, default)


@decoder_reader("Gemma 2", max_position_embeddings=8192, **GEMMA)
def read_gemma2(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Gemma 2 config: soft-caps, and a window in every other layer."""
    fields.only("use_bidirectional_attention", False)
    window = fields.integer("sliding_window", 4096)
    windows = sliding_layers(fields, sizes["num_layers"], every(2), window)
    return _common(fields, sizes) | {
        "layer_windows": windows,
        "attention_softcap": soft_cap(fields, "attn_logit_softcapping", 50.0),
        "final_softcap": soft_cap(fields, "final_logit_softcapping", 30.0),
    }


@decoder_reader("Gemma 3 text", max_position_embeddings=131072, **GEMMA)
def read_gemma3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Gemma 3 text config: local and global layers with their own RoPE.

    EmbeddingGemma's reads both ways; its window is half on either side.
    """
    window = fields.integer("sliding_window", 4096)
    is_causal = not fields.flag("use_bidirectional_attention")
    window = window if is_causal else window // 2 + 1
    pattern = max(fields.integer("sliding_window_pattern", 6), 1)
    windows = sliding_layers(fields, sizes["num_layers"], every(pattern), window)
    ropes = read_ropes(
        fields,
        sizes["head_dim"],
        theta=fields.number("rope_theta", 1e6),
        local_theta=fields.number("rope_local_base_freq", 10000.0),
    )
    return {
        **_common(fields, sizes),
        **two_ropes(ropes, windows),
        "qk_norm": "head",
        "is_causal": is_causal,
        "final_softcap": soft_cap(fields, "final_logit_softcapping", None),
    }


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
