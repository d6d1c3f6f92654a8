"""Mixtures of experts: Qwen3-MoE, Mixtral, OLMoE and gpt-oss.

A file has the layers of each expert by themselves; here those of all experts are one
array ``[e, in, out]``, with gate and up side by side. gpt-oss has them so in its files,
gate and up in turns.
"""

from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.families.llama import (
    LAYER,
    PRE_NORMS,
    SHARED,
    Config,
    decoder_family,
    finish,
    read_sizes,
    sliding_layers,
)
from lora_jax.models.families.rope import read_rope
from lora_jax.models.family import Family, Fields

COUNTS = ("num_local_experts", "num_experts")  # keys of the number of experts
MAX_EXPERTS = 4096  # of a layer; a config.json may ask for anything


def read_experts(
    fields: Fields,
    *,
    chosen: int | None,
    size: str,
    key: str = "num_experts_per_tok",
    **options: Any,
) -> dict[str, Any]:
    """Reads the sizes of a mixture of experts.

    Args:
      fields: the config.
      chosen: how many a token is sent to, where the file doesn't say; None if it must.
      size: the key of the width inside an expert.
      key: that of how many a token is sent to.
      **options: other arguments of `ExpertConfig`.

    Returns:
      ``{"experts": ...}`` for `DecoderConfig`; empty if there is a fault.
    """
    count = next((k for k in COUNTS if fields.config.get(k) is not None), COUNTS[0])
    experts = fields.integer(count)
    picked = fields.integer(key, *(() if chosen is None else (chosen,)))
    width = fields.integer(size)
    if experts > MAX_EXPERTS:
        fields.faults.append(f"{count} must be at most {MAX_EXPERTS}; got {experts}")
    try:
        return {"experts": ExpertConfig(experts, picked, width, **options)}
    except ValueError as error:
        fields.faults.append(str(error).rstrip("."))
        return {}


def read_qwen3_moe(config: Config) -> DecoderConfig:
    """Reads a Qwen3-MoE config: some layers may have a plain MLP."""
    fields = Fields(config, "Qwen3-MoE decoder")
    sizes = read_sizes(fields, max_positions_default=32768)
    layers = sizes["num_layers"]
    window = None
    if fields.flag("use_sliding_window"):
        window = fields.integer("sliding_window", 4096)
    step = max(fields.integer("decoder_sparse_step", 1), 1)
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(i) is not int for i in plain):
        fields.faults.append(f"mlp_only_layers must be integers; got {plain!r}"[:200])
        plain = []
    dense = tuple(i for i in range(layers) if i in plain or (i + 1) % step)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | {
            "qk_norm": "head",
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "ropes": (read_rope(fields, sizes["head_dim"]),),
            "layer_ropes": (0,) * layers,
            "layer_windows": sliding_layers(fields, layers, lambda _: True, window),
        }
        | read_experts(
            fields,
            chosen=8,
            size="moe_intermediate_size",
            is_normalized=fields.flag("norm_topk_prob"),
            dense_layers=dense,
        ),
    )


def read_mixtral(config: Config) -> DecoderConfig:
    """Reads a Mixtral config."""
    fields = Fields(config, "Mixtral decoder")
    sizes = read_sizes(fields, max_positions_default=131072)
    layers = sizes["num_layers"]
    if config.get("num_key_value_heads") is None:
        sizes["num_kv_heads"] = 8
    rope = read_rope(fields, sizes["head_dim"], default_theta=1e6)
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "ropes": (rope,),
            "layer_ropes": (0,) * layers,
            "layer_windows": (fields.integer("sliding_window", None),) * layers,
        }
        | read_experts(fields, chosen=2, size="intermediate_size"),
    )


def read_olmoe(config: Config) -> DecoderConfig:
    """Reads an OLMoE config: queries and keys are normalised before they are split."""
    fields = Fields(config, "OLMoE decoder")
    sizes = read_sizes(fields, max_positions_default=4096)
    bias = fields.flag("attention_bias")
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "qk_norm": "projection",
            "qkv_clip": fields.number("clip_qkv", None),
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "ropes": (read_rope(fields, sizes["head_dim"]),),
            "layer_ropes": (0,) * sizes["num_layers"],
        }
        | read_experts(
            fields,
            chosen=8,
            size="intermediate_size",
            is_normalized=fields.flag("norm_topk_prob"),
        ),
    )


def read_gpt_oss(config: Config) -> DecoderConfig:
    """Reads a gpt-oss config: attention sinks, biases, a bounded gate."""
    fields = Fields(config, "gpt-oss decoder")
    sizes = read_sizes(fields, max_positions_default=131072)
    sizes["head_dim"] = fields.integer("head_dim", 64)
    layers = sizes["num_layers"]
    window = fields.integer("sliding_window", 128)
    bias = fields.flag("attention_bias", True)
    rope = read_rope(fields, sizes["head_dim"], default_theta=150000.0)
    return finish(
        fields,
        sizes
        | {
            "norm_eps": fields.number("rms_norm_eps", 1e-5),
            "has_qkv_bias": bias,
            "has_output_bias": bias,
            "has_sinks": True,
            "ropes": (rope,),
            "layer_ropes": (0,) * layers,
            "layer_windows": sliding_layers(
                fields, layers, lambda i: i % 2 == 0, window
            ),
        }
        | read_experts(
            fields,
            chosen=4,
            size="intermediate_size",
            has_router_bias=True,
            has_bias=True,
            gate="clamped",
            gate_alpha=fields.number("swiglu_alpha", 1.702),
            gate_limit=fields.number("swiglu_limit", 7.0),
        ),
    )


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
