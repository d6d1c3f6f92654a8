"""The language models of Gemma 4: layers of two shapes, some without own keys.

26B-A4B has experts beside the MLP of each layer. E2B and E4B embed the tokens once more
for every layer, and their last layers use the keys and values of earlier ones; 31B has
values that are the keys before their norm.
"""

from typing import Any

from lora_jax.models.decoder_config import Rope
from lora_jax.models.families.gemma import MODULES, soft_cap
from lora_jax.models.families.llama import (
    LAYER,
    Sizes,
    attention_biases,
    decoder_family,
    decoder_reader,
    every,
    sliding_layers,
    two_ropes,
)
from lora_jax.models.families.mixtures import read_experts, whole_experts
from lora_jax.models.families.rope import read_rope
from lora_jax.models.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
Changes = list[dict[str, Any]]


@decoder_reader(
    "Gemma 4 text",
    max_position_embeddings=131072,
    head_dim=256,
    tie_word_embeddings=True,
)
def read_gemma4(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Gemma 4 text config."""
    if fields.config.get("use_bidirectional_attention") == "all":
        fields.faults.append("use_bidirectional_attention must not be 'all' here")
    window = fields.integer("sliding_window", 512)
    windows = sliding_layers(fields, sizes["num_layers"], every(6), window)
    windows = (*windows[:-1], None)  # as transformers has it
    changes = _changes(fields, sizes, windows)
    width = fields.integer("hidden_size_per_layer_input", 256)
    experts: Sizes = {}
    if fields.flag("enable_moe_block"):
        options = {"key": "top_k_experts", "is_beside_mlp": True}
        experts = read_experts(fields, "moe_intermediate_size", **options)
    return {
        **attention_biases(fields),
        **experts,
        **two_ropes(_ropes(fields, sizes["head_dim"], changes), windows),
        "activation": fields.text("hidden_activation", "gelu_pytorch_tanh"),
        "norm_placement": "both",
        "qk_norm": "head",
        "has_value_norm": True,
        "layer_changes": tuple(tuple(sorted(c.items())) for c in changes),
        "has_layer_scale": True,
        "per_layer_size": width or None,
        "per_layer_vocab": fields.integer("vocab_size_per_layer_input", 262144),
        "attention_scale": 1.0,
        "final_softcap": soft_cap(fields, "final_logit_softcapping", None),
        "embed_scale": max(sizes["hidden_size"], 1) ** 0.5,
    }


def _changes(fields: Fields, sizes: dict[str, Any], windows: Any) -> Changes:
    """What each layer's config has in place of the model's."""
    config, count = fields.config, len(windows)
    is_same = fields.flag("attention_k_eq_v")
    given = fields.mapping("per_layer_config")
    shared = fields.integer("num_kv_shared_layers", 0)
    first = count - shared
    heads = fields.integer("num_global_key_value_heads", sizes["num_kv_heads"])
    size = fields.integer("global_head_dim", 512)
    changes: Changes = []
    for i, window in enumerate(windows):
        change: dict[str, Any] = {}
        if given is not None:
            own = fields.nested(given.get(str(i)) or {})
            change["head_dim"] = own.integer("head_dim", sizes["head_dim"])
            change["num_kv_heads"] = own.integer(
                "num_key_value_heads", sizes["num_kv_heads"]
            )
        elif window is None:
            change["head_dim"] = size
            change["num_kv_heads"] = heads if is_same else sizes["num_kv_heads"]
        if window is None and is_same:
            change["value_is_key"] = True
        if i >= first:
            alike = [
                j for j in range(first) if (windows[j] is None) == (window is None)
            ]
            if not alike:
                fields.faults.append(
                    f"num_kv_shared_layers must leave a layer of each kind of "
                    f"{config.get('layer_types')}; got {shared}"
                )
                return []
            change["key_source"] = alike[-1]
            changes[alike[-1]]["is_key_source"] = True
            if fields.flag("use_double_wide_mlp"):
                change["mlp_size"] = 2 * sizes["mlp_size"]
        changes.append({k: v for k, v in change.items() if sizes.get(k) != v})
    return changes


def _ropes(fields: Fields, head_dim: int, changes: Changes) -> tuple[Rope, Rope]:
    """The tables of layers with full attention, and of those with a window."""
    settings = fields.mapping("rope_parameters") or {
        FULL: {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        SLIDING: {"rope_theta": 1e4},
    }
    full = settings.get(FULL)
    local = settings.get(SLIDING)
    if not isinstance(full, dict) or not isinstance(local, dict):
        fields.faults.append(f"rope_parameters must have {FULL} and {SLIDING}")
        full = local = {}
    wide = changes[-1].get("head_dim", head_dim) if changes else head_dim
    return read_rope(fields, wide, full), read_rope(fields, head_dim, local)


GEMMA4 = decoder_family(
    read_gemma4,
    MODULES
    | {
        "own_embed": "embed_tokens_per_layer",
        "own_projection": "per_layer_model_projection",
        "own_norm": "per_layer_projection_norm",
        "layer_{i}/own_gate": LAYER + "per_layer_input_gate",
        "layer_{i}/own_up": LAYER + "per_layer_projection",
        "layer_{i}/own_norm": LAYER + "post_per_layer_input_norm",
        "layer_{i}/layer_scale": LAYER + "layer_scalar",
        "layer_{i}/mlp_own_norm": LAYER + "post_feedforward_layernorm_1",
        "layer_{i}/mixture_norm": LAYER + "pre_feedforward_layernorm_2",
        "layer_{i}/mixture_post_norm": LAYER + "post_feedforward_layernorm_2",
        "layer_{i}/mixture/router": LAYER + "router.proj",
        "layer_{i}/mixture/router_scale": LAYER + "router.scale",
        "layer_{i}/mixture/expert_scale": LAYER + "router.per_expert_scale",
    }
    | whole_experts("layer_{i}/mixture/", LAYER),
    has_outputs_first=True,
    # Layers that use another's keys may have their own in the file.
    unused=(r"layers\.\d+\.self_attn\.[kv]_(proj|norm)\.",),
)
