"""The tiny models of ``make_hybrids.py``: layers without attention among others."""

from tests.golden.model_families import DECODER, SQUARE, Family, rope, without
from tests.golden.tower_families import TOKENS, VISUAL, tower

ROPE = rope(
    100.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 1], mrope_interleaved=True
)
LINEARS = r".*language_model\..*(_proj|in_proj_\w+|shared_expert_gate)"
QWEN = {
    **DECODER,
    "head_dim": 12,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": ROPE,
}
MOE = {
    **without(QWEN, "intermediate_size"),
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "shared_expert_intermediate_size": 9,
    "experts_implementation": "eager",
}
OUTER = {
    "vision_config": {
        **VISUAL,
        "out_hidden_size": 20,
        "spatial_merge_size": 1,
        "num_position_embeddings": 4,
    },
    "image_token_id": 40,
    "video_token_id": 41,
    "vision_start_token_id": 42,
    "vision_end_token_id": 42,
}
FULL_ROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
OTHER_EPS = {"rms_norm_eps": 1e-6}
DENSE_HYBRIDS = {
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        QWEN,
        (FULL_ROPE, OTHER_EPS),
        kinds=("plain", "dora"),
        greedy=True,
    ),
    "qwen3_5": tower(
        "Qwen3_5ForConditionalGeneration",
        {
            **without(QWEN, "tie_word_embeddings", *TOKENS),
            "num_hidden_layers": 2,
            "layer_types": QWEN["layer_types"][:2],
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        [FULL_ROPE],
        outer=OUTER,
        linears=LINEARS,
        kinds=("rslora",),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        {
            **without(SQUARE, "rms_norm_eps", "tie_word_embeddings"),
            "norm_eps": 0.02,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 3,
            "conv_bias": True,
            "block_multiple_of": 5,
            "block_ffn_dim_multiplier": 1.3,
            "rope_parameters": rope(100.0),
        },
        ({"norm_eps": 1e-6}, {"rope_parameters": rope(10000.0)}),
        attention=("q_proj", "v_proj"),
        mlp="feed_forward.w2",
        kinds=("plain",),
        greedy=True,
    ),
}
MIXTURE_HYBRIDS = {
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        MOE,
        ({"num_experts_per_tok": 3},),
        extra=("parameters", "linear"),
        greedy=True,
    ),
    "qwen3_5_moe": tower(
        "Qwen3_5MoeForConditionalGeneration",
        {
            **without(MOE, *TOKENS, "experts_implementation"),
            "num_hidden_layers": 2,
            "layer_types": QWEN["layer_types"][:2],
        },
        [],
        outer={**OUTER, "experts_implementation": "eager"},
        extra=("text",),
    ),
}
