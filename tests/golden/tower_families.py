"""The tiny multimodal folders of ``make_models.py``: a language model and a tower.

The tower is as small as its class allows, and never used: text in, text out. Adapters
are on the language model's layers; those in `with_images` on the tower's too.
"""

from tests.golden.dense_families import GEMMA4
from tests.golden.model_families import (
    DECODER,
    GEMMA,
    GEMMA3_ROPE,
    SQUARE,
    Family,
    rope,
    without,
)

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
PATCHES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
VISUAL = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 2,
    "temporal_patch_size": 1,
}
TOWER = r".*(vision_tower|visual|multi_modal_projector|embed_vision)\..*"


def tower(model: str, text: dict, changes: list[dict], **more) -> Family:
    """A folder whose text_config is ``text``; each change of it shows in the logits.

    Args:
      model: name of the class in transformers.
      text: of ``text_config``; whether it is tied is the folder's to say.
      changes: of ``text``.
      **more: arguments of `Family`; ``outer`` are keys beside ``text_config``.

    Returns:
      The family.
    """
    is_tied = text["tie_word_embeddings"]
    outer = {"tie_word_embeddings": is_tied, **more.pop("outer")}
    toggles = tuple({"text_config": {**text, **change}} for change in changes)
    return Family(
        model,
        {"text_config": text, **outer},
        toggles,
        silent=TOWER,
        **{"kinds": ("plain", "rslora"), **more},
    )


GEMMA3_TEXT = {
    **without(GEMMA, "final_logit_softcapping"),
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
    "rope_parameters": GEMMA3_ROPE,
}
# As the 31B: no embedding for each layer, values that are keys.
GEMMA4_TEXT = {
    **GEMMA4,
    "num_hidden_layers": 2,
    "layer_types": GEMMA4["layer_types"][:2],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
MISTRAL = {
    **DECODER,
    "model_type": "mistral",
    "sliding_window": None,
    "rope_parameters": rope(100.0),
}
QWEN2 = {
    **SQUARE,
    "rope_parameters": rope(50.0, mrope_section=[1, 1, 1]),
}
QWEN3 = {
    **DECODER,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "rope_parameters": rope(100.0, mrope_section=[2, 2, 2], mrope_interleaved=True),
}
TOWERS = {
    "gemma3_tower": tower(
        "Gemma3ForConditionalGeneration",
        GEMMA3_TEXT,
        [
            {"query_pre_attn_scalar": 6},
            {"sliding_window": 4},
            {"rope_parameters": GEMMA3_ROPE | {"full_attention": rope(500.0)}},
        ],
        outer={
            "vision_config": PATCHES | {"vision_use_head": False},
            "mm_tokens_per_image": 1,
            "image_token_index": 40,
        },
        extra=("embed", "with_images"),
        old={
            "tie_word_embeddings": None,
            "text_config": {
                **{
                    key: value
                    for key, value in GEMMA3_TEXT.items()
                    if key not in ("rope_parameters", "tie_word_embeddings")
                },
                "model_type": "gemma3_text",
                "rope_theta": 500.0,
                "rope_local_base_freq": 30.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        },
        greedy=True,
    ),
    "gemma4_tower": tower(
        "Gemma4ForConditionalGeneration",
        GEMMA4_TEXT,
        [{"sliding_window": 4}, {"final_logit_softcapping": None}],
        outer={
            "vision_config": {
                **PATCHES,
                "num_key_value_heads": 2,
                "head_dim": 4,
                "position_embedding_size": 4,
            },
            "audio_config": None,
            "image_token_id": 40,
            "video_token_id": 41,
            "audio_token_id": 42,
        },
    ),
    "mistral3": tower(
        "Mistral3ForConditionalGeneration",
        MISTRAL,
        [{"rope_parameters": rope(10000.0)}, {"rms_norm_eps": 1e-6}],
        outer={
            "vision_config": PATCHES | {"head_dim": 4, "model_type": "pixtral"},
            "image_token_index": 40,
        },
        extra=("saved",),
    ),
    "qwen2_5_vl": tower(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN2,
        [{"rope_parameters": QWEN2["rope_parameters"] | {"rope_theta": 1e4}}],
        outer={
            "vision_config": VISUAL
            | {"out_hidden_size": 24, "fullatt_block_indexes": [0]},
            "image_token_id": 40,
            "video_token_id": 41,
        },
        extra=("with_images",),
        old={
            "text_config": None,
            **without(QWEN2, "rope_parameters", *TOKENS),
            "rope_theta": 50.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
            "sliding_window": 5,
            "use_sliding_window": False,
            "max_window_layers": 1,
        },
    ),
    "qwen3_vl": tower(
        "Qwen3VLForConditionalGeneration",
        QWEN3,
        [
            {"rope_parameters": QWEN3["rope_parameters"] | {"rope_theta": 1e4}},
            {"rms_norm_eps": 1e-6},
        ],
        outer={
            "vision_config": VISUAL
            | {
                "out_hidden_size": 20,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 4,
            },
            "image_token_id": 40,
            "video_token_id": 41,
        },
    ),
}
