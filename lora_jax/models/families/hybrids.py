"""Qwen3.5 and 3.6, dense and with experts, and LFM2: few layers have attention.

The others mix tokens by a Gated DeltaNet or a short convolution, whose cache doesn't
grow with the text. ``layer_types`` says which is which.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.llama import (
    LAYER,
    PRE_NORMS,
    SHARED,
    Config,
    decoder_family,
    finish,
    plain_rope,
    read_sizes,
)
from lora_jax.models.families.mixtures import mixture_family, read_experts
from lora_jax.models.families.rope import read_rope, rotated_dim
from lora_jax.models.family import Fields
from lora_jax.models.mixer_config import DeltaNetConfig, MixerConfig, ShortConvConfig

FULL, LINEAR, CONV = "full_attention", "linear_attention", "conv"


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
    kinds = fields.sequence("layer_types", layers)
    if kinds is None:
        kinds = [FULL if has_attention(i) else kind for i in range(layers)]
    if wrong := sorted({str(k) for k in kinds if k not in (FULL, kind)}):
        fields.faults.append(f"layer_types must be of {(FULL, kind)}; got {wrong}")
    try:
        mixers = [None if k == FULL else make() for k in kinds]
    except ValueError as error:
        fields.faults.append(str(error).rstrip("."))
        return {}
    if len(set(mixers)) == 1:
        return {"mixer": mixers[0]}
    changes = tuple((("mixer", m),) if m else () for m in mixers)
    return {"layer_changes": changes}


def _read_qwen(fields: Fields, mlp_size: str) -> dict[str, Any]:
    sizes = read_sizes(fields, max_positions_default=32768, mlp_size=mlp_size)
    layers = sizes["num_layers"]
    sizes["head_dim"] = fields.integer("head_dim", 256)
    interval = max(fields.integer("full_attention_interval", 4), 1)
    fields.only("attn_output_gate", True)
    bias = fields.flag("attention_bias")

    def make() -> DeltaNetConfig:
        return DeltaNetConfig(
            num_heads=fields.integer("linear_num_value_heads", 32),
            num_key_heads=fields.integer("linear_num_key_heads", 16),
            key_dim=fields.integer("linear_key_head_dim", 128),
            value_dim=fields.integer("linear_value_head_dim", 128),
            conv_size=fields.integer("linear_conv_kernel_dim", 4),
        )

    return (
        sizes
        | {
            "norm_offset": 1.0,
            "qk_norm": "head",
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "has_output_gate": True,
            "ropes": (read_rope(fields, rotated_dim(fields, sizes["head_dim"], 0.25)),),
            "layer_ropes": (0,) * layers,
        }
        | read_mixers(fields, layers, lambda i: (i + 1) % interval == 0, LINEAR, make)
    )


def read_qwen3_5(config: Config) -> DecoderConfig:
    """Reads a dense Qwen3.5 text config: one layer in four has attention."""
    fields = Fields(config, "Qwen3.5 text decoder")
    return finish(fields, _read_qwen(fields, "intermediate_size"))


def read_qwen3_5_moe(config: Config) -> DecoderConfig:
    """Reads the text config of a Qwen3.5 with experts, one of which all tokens meet."""
    fields = Fields(config, "Qwen3.5-MoE text decoder")
    experts = read_experts(
        fields,
        chosen=8,
        size="moe_intermediate_size",
        shared_size=fields.integer("shared_expert_intermediate_size", 512),
    )
    return finish(fields, _read_qwen(fields, "moe_intermediate_size") | experts)


def read_lfm2(config: Config) -> DecoderConfig:
    """Reads an LFM2 config: short convolutions, and some layers of attention."""
    fields = Fields(config, "LFM2 decoder")
    key = "block_ff_dim" if config.get("block_ff_dim") else "intermediate_size"
    sizes = read_sizes(fields, max_positions_default=128000, mlp_size=key)
    layers = sizes["num_layers"]
    if config.get("num_key_value_heads") is None:
        sizes["num_kv_heads"] = 8
    if fields.flag("block_auto_adjust_ff_dim", True):
        sizes["mlp_size"] = _adjusted(fields, sizes["mlp_size"])
    own = config.get("full_attn_idxs")
    full = own if isinstance(own, list) else range(layers)

    def make() -> ShortConvConfig:
        return ShortConvConfig(
            fields.integer("conv_L_cache", 3), fields.flag("conv_bias")
        )

    tied = "tie_embedding" if "tie_embedding" in config else "tie_word_embeddings"
    return finish(
        fields,
        sizes
        | plain_rope(fields, sizes, default_theta=1e6)
        | {
            "activation": "silu",
            "norm_eps": fields.number("norm_eps", 1e-5),
            "qk_norm": "head",
            "is_tied": fields.flag(tied, True),
        }
        | read_mixers(fields, layers, lambda i: i in full, CONV, make),
    )


def _adjusted(fields: Fields, size: int) -> int:
    """The MLP's width where the file's is that of an MLP without a gate."""
    size = int(2 * size / 3)
    factor = fields.number("block_ffn_dim_multiplier", 1.0)
    if "block_ffn_dim_multiplier" in fields.config and (
        fields.config["block_ffn_dim_multiplier"] is None
    ):
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
