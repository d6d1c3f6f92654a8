"""Qwen3.5 and 3.6, dense and with experts, and LFM2: few layers have attention.

The others mix tokens by a Gated DeltaNet or a short convolution, whose cache doesn't
grow with the text. ``layer_types`` says which is which.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.models.families.llama import (
    LAYER,
    PRE_NORMS,
    SHARED,
    Sizes,
    attention_biases,
    decoder_family,
    decoder_reader,
    every,
    full_layers,
    one_rope,
)
from lora_jax.models.families.mixtures import mixture_family, read_experts
from lora_jax.models.families.rope import rotated_dim
from lora_jax.models.fields import Fields
from lora_jax.models.mixer_config import DeltaNetConfig, MixerConfig, ShortConvConfig

LINEAR, CONV = "linear_attention", "conv"


def read_mixers(
    fields: Fields,
    layers: int,
    has_attention: Callable[[int], bool],
    kind: str,
    make: Callable[[], MixerConfig],
) -> dict[str, Any]:
    """Reads what mixes the tokens in each layer.

    Args:
      fields: the config; collects the faults.
      layers: how many.
      has_attention: whether a layer has attention, where ``layer_types`` doesn't say.
      kind: the name of layers without.
      make: reads what they have instead.

    Returns:
      ``{"layer_changes": ...}`` for `DecoderConfig`, or ``{"mixer": ...}`` if all
      layers are alike.
    """
    found = full_layers(fields, layers, kind, has_attention)
    try:
        mixers = [None if has_own else make() for has_own in found]
    except ValueError as error:
        fields.faults.append(str(error).rstrip("."))
        return {}
    if len(set(mixers)) == 1:
        return {"mixer": mixers[0]}
    changes = tuple((("mixer", m),) if m else () for m in mixers)
    return {"layer_changes": changes}


QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "num_experts_per_tok": 8,
}


def _qwen(fields: Fields, sizes: Sizes) -> Sizes:
    interval = max(fields.integer("full_attention_interval", 4), 1)
    fields.only("attn_output_gate", True)

    def make() -> DeltaNetConfig:
        return DeltaNetConfig(
            num_heads=fields.integer("linear_num_value_heads", 32),
            num_key_heads=fields.integer("linear_num_key_heads", 16),
            key_dim=fields.integer("linear_key_head_dim", 128),
            value_dim=fields.integer("linear_value_head_dim", 128),
            conv_size=fields.integer("linear_conv_kernel_dim", 4),
        )

    return {
        **attention_biases(fields),
        **one_rope(fields, sizes, rotated_dim(fields, sizes["head_dim"], 0.25)),
        **read_mixers(fields, sizes["num_layers"], every(interval), LINEAR, make),
        "norm_offset": 1.0,
        "qk_norm": "head",
        "has_output_gate": True,
    }


@decoder_reader("Qwen3.5 text", **QWEN)
def read_qwen3_5(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a dense Qwen3.5 text config: one layer in four has attention."""
    return _qwen(fields, sizes)


@decoder_reader("Qwen3.5-MoE text", mlp_keys=("moe_intermediate_size",), **QWEN)
def read_qwen3_5_moe(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads the text config of a Qwen3.5 with experts, one of which all tokens meet."""
    shared = fields.integer("shared_expert_intermediate_size", 512)
    experts = read_experts(fields, "moe_intermediate_size", shared_size=shared)
    return _qwen(fields, sizes) | experts


@decoder_reader(
    "LFM2",
    mlp_keys=("block_ff_dim", "intermediate_size"),
    max_position_embeddings=128000,
    num_key_value_heads=8,
    rope_theta=1e6,
)
def read_lfm2(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads an LFM2 config: short convolutions, and some layers of attention."""
    layers, size = sizes["num_layers"], sizes["mlp_size"]
    own = fields.config.get("full_attn_idxs")
    full = own if isinstance(own, list) else range(layers)

    def make() -> ShortConvConfig:
        return ShortConvConfig(
            fields.integer("conv_L_cache", 3), fields.flag("conv_bias")
        )

    is_adjusted = fields.flag("block_auto_adjust_ff_dim", True)
    is_old = "tie_embedding" in fields.config
    return {
        **read_mixers(fields, layers, lambda i: i in full, CONV, make),
        "mlp_size": _adjusted(fields, size) if is_adjusted else size,
        "activation": "silu",
        "norm_eps": fields.number("norm_eps", 1e-5),
        "qk_norm": "head",
        "is_tied": fields.flag(
            "tie_embedding" if is_old else "tie_word_embeddings", True
        ),
    }


def _adjusted(fields: Fields, size: int) -> int:
    """The MLP's width where the file's is that of an MLP without a gate."""
    size = int(2 * size / 3)
    factor = fields.number("block_ffn_dim_multiplier", 1.0)
    if fields.is_null("block_ffn_dim_multiplier"):
        return size
    multiple = max(fields.integer("block_multiple_of", 256), 1)
    return multiple * -(-int(factor * size) // multiple)


_OURS = "layer_{i}/delta_net/"
_THEIRS = LAYER + "linear_attn."
DELTA_NET: Mapping[str, str] = {
    _OURS + "qkv": _THEIRS + "in_proj_qkv",
    _OURS + "gate": _THEIRS + "in_proj_z",
    _OURS + "beta": _THEIRS + "in_proj_b",
    _OURS + "decay": _THEIRS + "in_proj_a",
    _OURS + "conv": _THEIRS + "conv1d",
    _OURS + "decay_log": _THEIRS + "A_log",
    _OURS + "decay_bias": _THEIRS + "dt_bias",
    _OURS + "norm": _THEIRS + "norm",
    _OURS + "output": _THEIRS + "out_proj",
}
_SHARED_EXPERT = {
    f"layer_{{i}}/mlp/shared/{ours}": f"{LAYER}mlp.{theirs}"
    for ours, theirs in (
        ("gate", "shared_expert.gate_proj"),
        ("up", "shared_expert.up_proj"),
        ("down", "shared_expert.down_proj"),
        ("opening", "shared_expert_gate"),
    )
}
_QWEN = {**SHARED, **PRE_NORMS, **DELTA_NET}
_UNUSED = (r".*rotary_emb\.inv_freq", r"mtp\.")  # layers that predict more tokens
QWEN3_5 = decoder_family(read_qwen3_5, _QWEN, unused=_UNUSED)
QWEN3_5_MOE = mixture_family(
    read_qwen3_5_moe, _QWEN | _SHARED_EXPERT, unused=_UNUSED, is_served_whole=True
)
LFM2 = decoder_family(
    read_lfm2,
    SHARED
    | {
        "layer_{i}/attention/output": LAYER + "self_attn.out_proj",
        "layer_{i}/attention/query_norm": LAYER + "self_attn.q_layernorm",
        "layer_{i}/attention/key_norm": LAYER + "self_attn.k_layernorm",
        "layer_{i}/short_conv/input": LAYER + "conv.in_proj",
        "layer_{i}/short_conv/conv": LAYER + "conv.conv",
        "layer_{i}/short_conv/output": LAYER + "conv.out_proj",
        "layer_{i}/attention_norm": LAYER + "operator_norm",
        "layer_{i}/mlp_norm": LAYER + "ffn_norm",
        "layer_{i}/mlp/gate": LAYER + "feed_forward.w1",
        "layer_{i}/mlp/up": LAYER + "feed_forward.w3",
        "layer_{i}/mlp/down": LAYER + "feed_forward.w2",
        "final_norm": "embedding_norm",
    },
)
