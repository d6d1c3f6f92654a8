"""The tiny models of ``make_models.py`` of `lora_jax/models/families/dense.py`."""

from tests.golden.model_families import DECODER, SQUARE, Family, rope, without

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "attention_factor": 1.3,
    "original_max_position_embeddings": 16,
}
OLMO3_ROPE = {
    "sliding_attention": rope(5e5),
    "full_attention": {**YARN, "rope_theta": 5e5},
}
# Of 13 tokens the last three have the greatest factor.
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 5,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.5,
}
GRANITE = {
    **SQUARE,
    "tie_word_embeddings": True,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 3.0,
}
FEWER = ("plain", "rslora")
GEMMA4_ROPE = {
    "sliding_attention": rope(30.0),
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
    },
}
KINDS = [f"{kind}_attention" for kind in ("sliding", "full", "sliding")]
GEMMA4 = {
    **without(DECODER, "tie_word_embeddings"),
    "tie_word_embeddings": True,
    "num_hidden_layers": 5,
    "layer_types": [*KINDS, *KINDS[:2]],
    "sliding_window": 5,
    "final_logit_softcapping": 7.0,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 3,
    "vocab_size_per_layer_input": 43,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "rope_parameters": GEMMA4_ROPE,
}
DENSE = {
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {
            **SQUARE,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": OLMO3_ROPE,
        },
        (
            {"sliding_window": 4},
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"rope_parameters": OLMO3_ROPE | {"full_attention": rope(5e5)}},
        ),
        kinds=FEWER,
        old={
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": YARN,
        },
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {**DECODER, "rope_parameters": MINISTRAL3_ROPE},
        (
            {"rope_parameters": MINISTRAL3_ROPE | {"llama_4_scaling_beta": 0.0}},
            {"rope_parameters": MINISTRAL3_ROPE | {"mscale": 0.1}},
            {"sliding_window": 5},
        ),
        kinds=FEWER,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        {
            **DECODER,
            "head_dim": 12,
            "attention_bias": True,
            "rope_parameters": rope(100.0, partial_rotary_factor=0.5),
        },
        (
            {"rope_parameters": rope(100.0, partial_rotary_factor=1.0)},
            {"rms_norm_eps": 1e-6},
        ),
        kinds=FEWER,
        old={
            "rope_parameters": None,
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {**GRANITE, "rope_parameters": rope(100.0)},
        tuple(
            {key: 1.0}
            for key in (
                "embedding_multiplier",
                "attention_multiplier",
                "residual_multiplier",
                "logits_scaling",
            )
        ),
        kinds=FEWER,
        old={"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": None},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        {
            **SQUARE,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "layer_norm_eps": 0.02,
            "logit_scale": 0.3,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_parameters": rope(100.0),
        },
        (
            {"logit_scale": 1.0},
            {"layer_norm_eps": 1e-5},
            {"sliding_window": 4},
            {"layer_types": ["sliding_attention"] * 3},
            {"rope_parameters": rope(10000.0)},
        ),
        kinds=FEWER,
        old={
            "rope_parameters": None,
            "layer_types": None,
            "rope_theta": 100.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        GEMMA4,
        (
            {"final_logit_softcapping": None},
            {"sliding_window": 4},
            {"rope_parameters": GEMMA4_ROPE | {"full_attention": rope(100.0)}},
        ),
        kinds=FEWER,
        old={"per_layer_config": None, "global_head_dim": 8},
        greedy=True,
    ),
}
