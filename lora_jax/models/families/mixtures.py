"""Mixtures of experts: Qwen3-MoE, Mixtral, OLMoE and gpt-oss.

A file has the layers of each expert by themselves; here those of all experts are one
array ``[e, in, out]``, with gate and up side by side. gpt-oss has them so in its files,
gate and up in turns.
"""

from typing import Any

from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.families.llama import (
    LAYER,
    PRE_NORMS,
    SHARED,
    Sizes,
    attention_biases,
    decoder_family,
    decoder_reader,
    every,
    sliding_layers,
    window_if_used,
)
from lora_jax.models.family import Family
from lora_jax.models.fields import Fields

COUNTS = ("num_local_experts", "num_experts")  # keys of the number of experts
MAX_EXPERTS = 4096  # of a layer; a config.json may ask for anything


def read_experts(
    fields: Fields, size: str, *, key: str = "num_experts_per_tok", **options: Any
) -> dict[str, Any]:
    """Reads the sizes of a mixture of experts.

    Args:
      fields: the config.
      size: the key of the width inside an expert.
      key: that of how many a token is sent to.
      **options: other arguments of `ExpertConfig`.

    Returns:
      ``{"experts": ...}`` for `DecoderConfig`; empty if there is a fault.
    """
    count = next((k for k in COUNTS if fields.config.get(k) is not None), COUNTS[0])
    experts = fields.integer(count)
    picked, width = fields.integer(key), fields.integer(size)
    if experts > MAX_EXPERTS:
        fields.faults.append(f"{count} must be at most {MAX_EXPERTS}; got {experts}")
    try:
        return {"experts": ExpertConfig(experts, picked, width, **options)}
    except ValueError as error:
        fields.faults.append(str(error).rstrip("."))
        return {}


@decoder_reader("Qwen3-MoE", max_position_embeddings=32768, num_experts_per_tok=8)
def read_qwen3_moe(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Qwen3-MoE config: some layers may have a plain MLP."""
    layers = sizes["num_layers"]
    window = window_if_used(fields)
    step = max(fields.integer("decoder_sparse_step", 1), 1)
    plain = fields.config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(i) is not int for i in plain):
        fields.faults.append(f"mlp_only_layers must be integers; got {plain!r}"[:200])
        plain = []
    experts = read_experts(
        fields,
        "moe_intermediate_size",
        is_normalized=fields.flag("norm_topk_prob"),
        dense_layers=tuple(i for i in range(layers) if i in plain or (i + 1) % step),
    )
    return {
        **attention_biases(fields),
        **experts,
        "qk_norm": "head",
        "layer_windows": sliding_layers(fields, layers, lambda _: False, window),
    }


@decoder_reader(
    "Mixtral",
    max_position_embeddings=131072,
    num_key_value_heads=8,
    num_experts_per_tok=2,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
)
def read_mixtral(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Mixtral config."""
    window = fields.integer("sliding_window", None)
    return read_experts(fields, "intermediate_size") | {
        "layer_windows": (window,) * sizes["num_layers"]
    }


@decoder_reader(
    "OLMoE", max_position_embeddings=4096, num_experts_per_tok=8, rms_norm_eps=1e-5
)
def read_olmoe(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads an OLMoE config: queries and keys are normalised before they are split."""
    del sizes
    is_normalized = fields.flag("norm_topk_prob")
    return {
        **attention_biases(fields),
        **read_experts(fields, "intermediate_size", is_normalized=is_normalized),
        "qk_norm": "projection",
        "qkv_clip": fields.number("clip_qkv", None),
    }


@decoder_reader(
    "gpt-oss",
    max_position_embeddings=131072,
    head_dim=64,
    num_experts_per_tok=4,
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    attention_bias=True,
)
def read_gpt_oss(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a gpt-oss config: attention sinks, biases, a bounded gate."""
    window = fields.integer("sliding_window", 128)
    windows = sliding_layers(fields, sizes["num_layers"], every(2), window)
    experts = read_experts(
        fields,
        "intermediate_size",
        has_router_bias=True,
        has_bias=True,
        gate="clamped",
        gate_alpha=fields.number("swiglu_alpha", 1.702),
        gate_limit=fields.number("swiglu_limit", 7.0),
    )
    return {
        **attention_biases(fields),
        **experts,
        "has_sinks": True,
        "layer_windows": windows,
    }


def mixture_family(
    read_config: Any,
    modules: dict[str, str],
    *,
    block: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    **options: Any,
) -> Family:
    """Makes a family whose files store experts separately.

    Args:
      read_config: as `Family`'s.
      modules: names of all but the experts and the router.
      block: what a layer's mixture is called in a file.
      parts: what an expert's gate, up and down are called there.
      **options: of `decoder_family`.

    Returns:
      The family.
    """
    here, file = "layer_{i}/mlp/", f"{LAYER}{block}."
    names = ("gate", "up", "down")
    return decoder_family(
        read_config,
        modules
        | {
            here + "router": file + "gate",
            here + "experts/gate_up": file + "experts.gate_up_proj",
            here + "experts/down": file + "experts.down_proj",
        }
        | {
            f"{here}experts/expert_{{e}}/{name}": f"{file}experts.{{e}}.{part}"
            for name, part in zip(names, parts, strict=True)
        },
        experts={here + "experts/gate_up": names[:2], here + "experts/down": names[2:]},
        **options,
    )


QWEN3_MOE = mixture_family(read_qwen3_moe, SHARED | PRE_NORMS)
MIXTRAL = mixture_family(
    read_mixtral,
    SHARED | PRE_NORMS,
    block="block_sparse_moe",
    parts=("w1", "w3", "w2"),
    renames=((r"block_sparse_moe\b", "mlp"),),
)
OLMOE = mixture_family(read_olmoe, SHARED | PRE_NORMS)


def whole_experts(here: str, file: str) -> dict[str, str]:
    """Returns names of experts that a file has as one tensor, for `Family.modules`.

    Args:
      here: path of the mixture, with a slash.
      file: name of the module that has ``experts``, with a dot.
    """
    return {
        f"{here}experts/{ours}{leaf}": f"{file}experts.{theirs}{end}"
        for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj"))
        for leaf, end in (("", ""), ("/kernel", ""), ("/bias", "_bias"))
    }


GPT_OSS = decoder_family(
    read_gpt_oss,
    SHARED
    | PRE_NORMS
    | whole_experts("layer_{i}/mlp/", LAYER + "mlp.")
    | {
        "layer_{i}/mlp/router": LAYER + "mlp.router",
        "layer_{i}/attention/sinks": LAYER + "self_attn.sinks",
    },
)
