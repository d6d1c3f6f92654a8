"""Translating GGUF's metadata to Hugging Face's config, per architecture.

Constants that are in llama.cpp's code and not in the file (Gemma's window pattern and
attention scale) are constants here too. Anything else that would change the maths is
an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.gguf_names import (
    ARCHITECTURES,
    EMBED_TENSOR,
    HEAD_TENSOR,
    MIXTRAL,
    architecture_of,
)

ROPE_FACTORS = "rope_freqs.weight"
KINDS = ("full_attention", "sliding_attention")  # by whether there is a window
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4}  # the last has no window
GEMMA_LOCAL_ROPE = 10_000.0
# Layer counts of the two models whose attention scale is not that of the head size.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


_FIELDS = {  # Hugging Face's name: (GGUF's, type)
    "num_hidden_layers": ("block_count", int),
    "hidden_size": ("embedding_length", int),
    "intermediate_size": ("feed_forward_length", int),
    "num_attention_heads": ("attention.head_count", int),
    "max_position_embeddings": ("context_length", int),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
}

# Keys of one architecture alone: Hugging Face's name, and GGUF's of a number.
_NUMBERS = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "granite": {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
    "cohere2": {
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "logit_scale": "logit_scale",
    },
}


def hugging_face_config(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Returns the equivalent of ``config.json``.

    Args:
      path: the file, for error messages.
      metadata: its header's fields.
      shapes: its tensors' shapes, by Hugging Face's names.
      rope_factors: the tensor of Llama 3's RoPE scaling, if the file has one.

    Returns:
      The config.

    Raises:
      ValueError: listing every field that is missing, invalid or not supported.
    """
    name = architecture_of(path, metadata)
    fields = _Fields(metadata, metadata["general.architecture"])
    config = _shape(fields, name) | _vocabulary(fields, shapes)
    if ARCHITECTURES[name].shifted_norms:
        config |= _gemma(fields, name, config)
    config |= _own_keys(fields, name, config)
    config["rope_scaling"] = _rope_scaling(fields, rope_factors, config)
    if not fields.faults:
        _check_heads(fields, shapes, config)
    if ARCHITECTURES[name].experts:
        config |= _experts(fields, name)
    elif fields.get("expert_count", int, 0):
        fields.faults.append(f"expert_count must be 0: a {name} has no experts here")
    if fields.faults:
        raise ValueError(
            f"{path} must contain the metadata of a {name} model; "
            f"{len(fields.faults)} faults: {'; '.join(fields.faults)}."
        )
    return config


def _shape(fields: "_Fields", name: str) -> dict[str, Any]:
    """Returns the sizes of layers and rotary embedding."""
    rule = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [rule.class_name],
        "model_type": rule.model_type,
        "hidden_act": "gelu_pytorch_tanh" if rule.shifted_norms else "silu",
    }
    for key, (stored, kind) in _FIELDS.items():
        if name != "cohere2" or key != "rms_norm_eps":  # whose norms subtract the mean
            config[key] = fields.get(stored, kind)
    heads = config["num_attention_heads"] or 1
    kv_heads = fields.get("attention.head_count_kv", int, heads)
    config["num_key_value_heads"] = kv_heads
    config["rope_theta"] = fields.get("rope.freq_base", float, 10_000.0)
    width = config["hidden_size"] // heads
    if name in ("llama", MIXTRAL):
        width = fields.get("rope.dimension_count", int, width)
    config["head_dim"] = fields.get("attention.key_length", int, width)
    rotated = fields.get("rope.dimension_count", int, config["head_dim"])
    if heads % kv_heads:
        fields.faults.append(f"{heads} heads must be a multiple of {kv_heads} kv heads")
    if name == "phi3":
        window = fields.get("attention.sliding_window", int, 0)
        config["sliding_window"] = window or None
    if name in ("phi3", "glm4"):
        if rotated != config["head_dim"]:
            config["partial_rotary_factor"] = rotated / (config["head_dim"] or 1)
    elif rotated != config["head_dim"]:
        fields.faults.append(
            f"rope.dimension_count must be the head size {config['head_dim']}, got "
            f"{rotated}"
        )
    return config


def _vocabulary(
    fields: "_Fields", shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns the keys derived from the tensors, and the ids of special tokens."""
    config: dict[str, Any] = {
        "tie_word_embeddings": HEAD_TENSOR not in shapes,
        "attention_bias": any(name.endswith("q_proj.bias") for name in shapes),
        "vocab_size": 0,
    }
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = fields.metadata.get(f"tokenizer.ggml.{stored}_token_id")
        config[f"{key}_token_id"] = token if type(token) is int else None
    embedding = shapes.get(EMBED_TENSOR, ())
    if len(embedding) == 2:
        config["vocab_size"] = embedding[0]
    else:
        fields.faults.append(
            f"token_embd.weight must be [vocab, width], got {embedding or 'nothing'}"
        )
    return config


def _check_heads(
    fields: "_Fields",
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> None:
    for name, rows in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        expected = config[rows] * config["head_dim"]
        wrong = {
            shape[0] if shape else 1
            for key, shape in shapes.items()
            if f".self_attn.{name}_proj." in key and shape[:1] != (expected,)
        }
        if wrong:
            fields.faults.append(
                f"attn_{name} must have {config[rows]} heads of {config['head_dim']} "
                f"rows = {expected}, got {sorted(wrong)}"
            )


class _Fields:
    """Reads an architecture's metadata, collecting the faults."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str):
        self.metadata, self.prefix = metadata, prefix
        self.faults: list[str] = []

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns a positive value; ``default`` makes the field optional."""
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # the same for each layer
        if kind is float and type(value) in (int, float):
            with np.errstate(over="ignore"):  # infinite is not positive, below
                value = float(str(np.float32(value)))  # 1e-05, not 9.99999974e-06
        positive = type(value) is kind and (kind is str or 0 < value < math.inf)
        is_default = type(value) is type(default) and value == default
        if not positive and not is_default:
            got = "nothing" if value is None else repr(value)[:60]
            self.faults.append(f"{key} must be a positive {kind.__name__}, got {got}")
            return default if default is not None else kind(0)
        if value is None:
            self.faults.append(f"{key} is missing")
            return kind(0)
        return value


def _gemma(fields: _Fields, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Gemma's additional keys, with llama.cpp's constants."""
    heads, head_dim = config["num_attention_heads"] or 1, config["head_dim"]
    large = config["num_hidden_layers"] == GEMMA_27B[name]
    extra: dict[str, Any] = {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": config["hidden_size"] // heads if large else head_dim,
    }
    if name == "gemma3":
        extra["rope_theta"] = fields.get("rope.freq_base", float, 1_000_000.0)
        extra["rope_local_base_freq"] = GEMMA_LOCAL_ROPE
    return extra


def _own_keys(fields: _Fields, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that other architectures don't have."""
    keys = _NUMBERS.get(name, {})
    extra: dict[str, Any] = {k: fields.get(own, float) for k, own in keys.items()}
    layers = min(config["num_hidden_layers"], 10_000)
    if period := WINDOW_PERIODS.get(name):
        extra["sliding_window"] = fields.get("attention.sliding_window", int)
        extra["layer_types"] = [KINDS[(i + 1) % period != 0] for i in range(layers)]
    if name == "glm4" and f"{name}.rope.dimension_sections" in fields.metadata:
        fields.faults.append(
            "rope.dimension_sections must be absent: M-RoPE is not read"
        )
    window = fields.get("attention.sliding_window", int, 0) if name == "olmo2" else 0
    if window:  # OLMo 3, which llama.cpp gives the same name
        slides: Any = fields.metadata.get(f"{name}.attention.sliding_window_pattern")
        if np.size(slides) != layers or np.asarray(slides).dtype != bool:
            fields.faults.append(
                f"attention.sliding_window_pattern must be {layers} flags, one per "
                "layer"
            )
            slides = [False] * layers
        extra |= {
            "model_type": "olmo3",
            "architectures": ["Olmo3ForCausalLM"],
            "sliding_window": window,
            "layer_types": [KINDS[bool(each)] for each in np.atleast_1d(slides)],
        }
    return extra


def _experts(fields: _Fields, name: str) -> dict[str, Any]:
    """Returns the keys of a mixture of experts, each layer of which is one."""
    extra: dict[str, Any] = {
        "num_experts": fields.get("expert_count", int),
        "num_experts_per_tok": fields.get("expert_used_count", int),
    }
    if name == "qwen3moe":
        extra["moe_intermediate_size"] = fields.get("expert_feed_forward_length", int)
    if name != MIXTRAL:
        extra["norm_topk_prob"] = ARCHITECTURES[name].has_normalized_scores
    if fields.get("expert_shared_count", int, 0):
        fields.faults.append("expert_shared_count must be 0: no expert is shared here")
    return extra


def _yarn(fields: _Fields) -> dict[str, Any]:
    """Returns YaRN's scaling; llama.cpp's own numbers are transformers' defaults."""
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (found := fields.get(f"rope.scaling.{key}", float, 1.0)) != 1:
            fields.faults.append(f"rope.scaling.{key} must be 1, got {found}")
    if f"{fields.prefix}.rope.scaling.yarn_log_multiplier" in fields.metadata:
        fields.faults.append("rope.scaling.yarn_log_multiplier must be absent")
    return {
        "rope_type": "yarn",
        "factor": fields.get("rope.scaling.factor", float),
        "original_max_position_embeddings": fields.get(
            "rope.scaling.original_context_length", int
        ),
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _rope_scaling(
    fields: _Fields, factors: np.ndarray | None, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the file's RoPE scaling, or None."""
    kind = fields.get("rope.scaling.type", str, "none")
    if factors is not None:
        if found := _llama3_scaling(factors, config):
            return found
        fields.faults.append(f"{ROPE_FACTORS} must be Llama 3's factors; they are not")
    if kind == "linear":
        factor = fields.get("rope.scaling.factor", float)
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(fields)
    if kind != "none":
        fields.faults.append(
            f"rope.scaling.type must be none, linear or yarn, got {kind!r}"
        )
    return None


def _llama3_scaling(
    factors: np.ndarray, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Finds the parameters of Llama 3's scaling from the factors of the frequencies.

    Llama 3.1 and 3.3 scale by 8 and Llama 3.2 by 32, both from 8192 tokens with low and
    high factors 1 and 4.
    """
    head_dim, old = config["head_dim"], 8192
    if factors.shape != (head_dim // 2,):
        return None
    frequency = config["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = old * frequency / (2 * np.pi)
    for factor in (8.0, 32.0):
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(factors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": old,
            }
    return None
