"""The tiny models of ``make_models.py``: one `Family` per folder of ``tests/golden``.

Sizes are small and odd where the architecture lets them be, so that a wrong axis can't
fit; `eps`, windows and caps are far from their defaults, so that ignoring one shows.
"""

from dataclasses import dataclass

DECODER = {
    "vocab_size": 43,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 21,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_labels": 4,
    "layer_norm_eps": 0.02,
}
TEXT = {"vocab_size": 43, "max_position_embeddings": 19}
IMAGE = {"image_size": 12, "patch_size": 4, "num_channels": 3}


def without(sizes: dict, *names: str) -> dict:
    return {key: value for key, value in sizes.items() if key not in names}


# A decoder whose head size is always hidden_size / num_attention_heads.
SQUARE = {**without(DECODER, "head_dim"), "hidden_size": 24}


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


@dataclass(frozen=True)
class Family:
    """One tiny model and the adapters on it.

    Attributes:
        model: Name of the class in transformers.
        config: What its config class is called with.
        toggles: Config changes, each of which must change the logits.
        attention: Two attention projections, the targets of small adapters.
        mlp: The last projection of the feed-forward block.
        kinds: Adapters on it (see ``make_models.adapters``).
        extra: Adapters beside those.
        silent: Parameters (a regex) that can't show in the logits.
        old: Config keys as transformers 4 wrote them, in place of the new ones (None).
        greedy: Whether to record greedy decoding.
        linears: The targets of adapters of all linear layers, if not ``all-linear``.
    """

    model: str
    config: dict
    toggles: tuple[dict, ...] = ()
    attention: tuple[str, str] = ("q_proj", "v_proj")
    mlp: str = "mlp.down_proj"
    kinds: tuple[str, ...] = ("plain", "rslora", "dora")
    extra: tuple[str, ...] = ()
    silent: str = "$"
    old: dict | None = None
    greedy: bool = False
    linears: str = ""


# Of the three wavelengths 6, 29 and 135 one is under 64 / 4 and one above 64 / 1.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    **DECODER,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
    "final_logit_softcapping": 7.0,
}
GEMMA3_ROPE = {
    "sliding_attention": rope(30.0),
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
}
MODERNBERT_ROPE = {"full_attention": rope(100.0), "sliding_attention": rope(20.0)}
MODERNBERT = {
    "vocab_size": 43,
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 19,
    "norm_eps": 0.02,
    "local_attention": 4,
    "global_attn_every_n_layers": 2,
    "rope_parameters": MODERNBERT_ROPE,
    "classifier_pooling": "mean",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_labels": 4,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {**DECODER, "rope_parameters": rope(100.0)},
        ({"rope_parameters": rope(10000.0)}, {"rms_norm_eps": 1e-6}),
        extra=("embed", "saved"),
        greedy=True,
    ),
    "llama3": Family(
        "LlamaForCausalLM",
        {
            **DECODER,
            "max_position_embeddings": 512,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3},
        },
        (
            {"rope_parameters": rope(100.0)},
            {"rope_parameters": rope(100.0, **LLAMA3) | {"rope_type": "linear"}},
        ),
        old={
            "rope_parameters": None,
            "rope_theta": 100.0,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**DECODER, "sliding_window": 5, "rope_parameters": rope(100.0)},
        ({"sliding_window": None}, {"sliding_window": 6}, {"sliding_window": 4}),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**SQUARE, "tie_word_embeddings": True, "rope_parameters": rope(50.0)},
        ({"rope_parameters": rope(10000.0)},),
        old={
            "rope_parameters": None,
            "layer_types": None,
            "rope_theta": 50.0,
            "sliding_window": 5,
            "use_sliding_window": False,
        },
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**DECODER, "head_dim": 8, "rope_parameters": rope(100.0)},
        ({"rope_parameters": rope(10000.0)}, {"rms_norm_eps": 1e-6}),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **SQUARE,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 2,
            "rope_parameters": rope(100.0),
        },
        ({"no_rope_layer_interval": 9}, {"no_rope_layers": [0, 1, 0]}),
        old={
            "rope_parameters": None,
            "layer_types": None,
            "no_rope_layers": None,
            "rope_theta": 100.0,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": 2.0, "rope_parameters": rope(100.0)},
        (
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 6},
            {"sliding_window": 6},
            {"sliding_window": 4},
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"layer_types": ["full_attention", "full_attention"]},
        ),
        greedy=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            **without(GEMMA, "final_logit_softcapping"),
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
            "rope_parameters": GEMMA3_ROPE,
        },
        (
            {"query_pre_attn_scalar": 6},
            {"sliding_window": 6},
            {"sliding_window": 4},
            {"sliding_window_pattern": 2},
            {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": rope(500.0)}},
            {"rope_parameters": GEMMA3_ROPE | {"full_attention": rope(500.0)}},
            {"rope_parameters": GEMMA3_ROPE | {"full_attention": rope(30.0)}},
        ),
        old={
            "rope_parameters": None,
            "layer_types": None,
            "_sliding_window_pattern": None,
            "sliding_window_pattern": 3,
            "rope_theta": 500.0,
            "rope_local_base_freq": 30.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {**SQUARE, "rope_parameters": rope(100.0)},
        ({"rope_parameters": rope(10000.0)}, {"sliding_window": 5}),
        attention=("qkv_proj", "o_proj"),
    ),
    "phi3_partial": Family(
        "Phi3ForCausalLM",
        {
            **SQUARE,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "rope_parameters": rope(100.0, partial_rotary_factor=0.5),
        },
        (
            {"sliding_window": None},
            {"rope_parameters": rope(100.0, partial_rotary_factor=1.0)},
        ),
        attention=("qkv_proj", "o_proj"),
        old={
            "rope_parameters": None,
            "rope_theta": 100.0,
            "rope_scaling": None,
            "partial_rotary_factor": 0.5,
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**SQUARE, "rope_parameters": rope(100.0)},
        ({"rope_parameters": rope(10000.0)}, {"rms_norm_eps": 1e-6}),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": 43,
            "n_positions": 24,
            "n_embd": 20,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 28,
            "layer_norm_epsilon": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        (
            {"scale_attn_weights": False},
            {"scale_attn_by_inverse_layer_idx": True},
            {"layer_norm_epsilon": 1e-5},
            {"activation_function": "relu"},
        ),
        attention=("c_attn", "attn.c_proj"),
        mlp="mlp.c_proj",
        greedy=True,
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        {**ENCODER, **TEXT, "type_vocab_size": 1, "pad_token_id": 1},
        ({"pad_token_id": 2}, {"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        attention=("query", "value"),
        mlp="output.dense",
        extra=("saved",),
        silent=r".*\.key\.bias$",
    ),
    "xlm-roberta": Family(
        "XLMRobertaForSequenceClassification",
        {**ENCODER, **TEXT, "type_vocab_size": 1, "pad_token_id": 1},
        ({"pad_token_id": 2}, {"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        attention=("query", "value"),
        mlp="output.dense",
        kinds=("plain", "rslora"),
        extra=("saved",),
        silent=r".*\.key\.bias$",
    ),
    "electra": Family(
        "ElectraForSequenceClassification",
        {**ENCODER, **TEXT, "embedding_size": 15},
        ({"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        attention=("query", "value"),
        mlp="output.dense",
        kinds=("plain", "rslora"),
        extra=("saved",),
        silent=r".*\.key\.bias$",
    ),
    "mpnet": Family(
        "MPNetForSequenceClassification",
        {**ENCODER, **TEXT},
        ({"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        attention=("attn.q", "attn.v"),
        mlp="output.dense",
        kinds=("plain", "rslora"),
        extra=("saved",),
        silent=r".*\.k\.bias$",
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        MODERNBERT,
        (
            {"local_attention": 6},
            {"layer_types": ["full_attention"] * 3},
            {"norm_eps": 1e-6},
            {"hidden_activation": "relu"},
            {"classifier_activation": "relu"},
            {"classifier_pooling": "cls"},
            {"rope_parameters": MODERNBERT_ROPE | {"full_attention": rope(20.0)}},
            {"rope_parameters": MODERNBERT_ROPE | {"sliding_attention": rope(100.0)}},
        ),
        attention=("Wqkv", "attn.Wo"),
        mlp="mlp.Wo",
        extra=("saved",),
        old={
            "rope_parameters": None,
            "layer_types": None,
            "global_attn_every_n_layers": 2,
            "global_rope_theta": 100.0,
            "local_rope_theta": 20.0,
        },
    ),
    "modernbert_bias": Family(
        "ModernBertForSequenceClassification",
        {
            **MODERNBERT,
            "num_hidden_layers": 2,
            "local_attention": 5,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "cls",
        },
        attention=("Wqkv", "attn.Wo"),
        mlp="mlp.Wo",
        kinds=("plain",),
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        {
            **TEXT,
            "dim": 21,
            "hidden_dim": 28,
            "n_layers": 2,
            "n_heads": 3,
            "num_labels": 4,
        },
        ({"activation": "relu"},),
        attention=("q_lin", "v_lin"),
        mlp="ffn.lin2",
        silent=r".*\.k_lin\.bias$",
    ),
    "vit": Family(
        "ViTForImageClassification",
        {**ENCODER, **IMAGE},
        ({"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        mlp="mlp.fc2",
        extra=("conv",),
        silent=r".*\.k_proj\.bias$",
    ),
    "dinov2": Family(
        "Dinov2ForImageClassification",
        {**without(ENCODER, "intermediate_size"), **IMAGE, "mlp_ratio": 2},
        ({"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}),
        mlp="mlp.fc2",
        silent=r".*(\.k_proj\.bias|mask_token)$",
    ),
}
# The BERT of make_bert.py, which has its own folder already.
BERT = Family(
    "BertForSequenceClassification",
    {},
    attention=("query", "value"),
    mlp="output.dense",
    extra=("saved",),
)
