"""The tiny encoders of ``make_models.py`` that ``model_families.py`` hasn't."""

from tests.golden.model_families import ENCODER, TEXT, Family, without

DEBERTA = {
    **ENCODER,
    **TEXT,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "pad_token_id": 0,
    "pooler_hidden_act": "gelu",
}
V3 = {
    **DEBERTA,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 6,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
ATTENTION = ("query_proj", "value_proj")
VISION = {
    **without(ENCODER, "num_labels"),
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
}
WORDS = {
    **without(ENCODER, "num_labels"),
    "vocab_size": 43,
    "max_position_embeddings": 13,
    "hidden_size": 15,
    "intermediate_size": 26,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 37,
}
SIGLIP = {"vision_config": VISION, "text_config": {**WORDS, "projection_size": 21}}
LAYERS = r".*layers\.\d+\..*(_proj|fc\d)"
ENCODERS = {
    "clip": Family(
        "CLIPModel",
        {"vision_config": VISION, "text_config": WORDS, "projection_dim": 17},
        (
            {"vision_config": {**VISION, "hidden_act": "relu"}},
            {"text_config": {**WORDS, "hidden_act": "relu"}},
            {"text_config": {**WORDS, "layer_norm_eps": 1e-5}},
            {"text_config": {**WORDS, "eos_token_id": 2}},
        ),
        attention=("q_proj", "v_proj"),
        mlp="mlp.fc2",
        kinds=("plain", "rslora"),
        silent=r".*\.k_proj\.bias$",
    ),
    "siglip": Family(
        "SiglipModel",
        SIGLIP,
        ({"vision_config": {**VISION, "hidden_act": "relu"}},),
        attention=("q_proj", "v_proj"),
        mlp="mlp.fc2",
        kinds=("plain", "rslora"),
        silent=r".*\.k_proj\.bias$",
    ),
    "clip_text": Family(
        "CLIPTextModelWithProjection",
        {**WORDS, "projection_dim": 17},
        ({"hidden_act": "relu"}, {"eos_token_id": 2}),
        kinds=("plain",),
        silent=r".*\.k_proj\.bias$",
        linears=LAYERS,
    ),
    "clip_vision": Family(
        "CLIPVisionModel",
        VISION,
        ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}),
        kinds=("plain",),
        silent=r".*\.k_proj\.bias$",
        linears=LAYERS,
    ),
    "siglip_text": Family(
        "SiglipTextModel",
        {**WORDS, "projection_size": 21},
        ({"hidden_act": "relu"},),
        kinds=("plain",),
        silent=r".*\.k_proj\.bias$",
        linears=LAYERS,
    ),
    "siglip_vision": Family(
        "SiglipVisionModel",
        VISION,
        ({"hidden_act": "relu"},),
        kinds=("plain",),
        silent=r".*\.k_proj\.bias$",
        linears=LAYERS,
    ),
    "deberta": Family(  # as v3
        "DebertaV2ForSequenceClassification",
        V3,
        (
            {"layer_norm_eps": 1e-5},
            {"hidden_act": "relu"},
            {"pooler_hidden_act": "relu"},
            {"pos_att_type": "p2c"},
            {"pos_att_type": "c2p"},
            {"max_relative_positions": 40},
        ),
        attention=ATTENTION,
        mlp="output.dense",
        kinds=("plain", "rslora"),
        extra=("saved",),
    ),
    "deberta_conv": Family(  # with v2-xlarge's convolution
        "DebertaV2ForSequenceClassification",
        {
            **DEBERTA,
            "share_att_key": False,
            "max_relative_positions": 4,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "conv_kernel_size": 3,
            "conv_groups": 3,
            "conv_act": "gelu",
        },
        ({"conv_act": "tanh"},),
        attention=ATTENTION,
        mlp="output.dense",
        kinds=("plain",),
        silent=r".*\.pos_key_proj\.bias$",
    ),
}
