"""DeBERTa v2 and v3: attention with scores of distances, v2's with a convolution."""

from typing import Any

from lora_jax.models.disentangled import Disentangled
from lora_jax.models.encoder_config import POOLERS, ConvConfig, EncoderConfig
from lora_jax.models.families.bert import LAYER, SHARED, text_family
from lora_jax.models.fields import MAX_SIZE, Fields, config_reader

TYPES = ("c2p", "p2c")


@config_reader(EncoderConfig, "DeBERTa encoder")
def read_deberta(fields: Fields) -> dict[str, Any]:
    """Reads a DeBERTa v2 or v3 config; absent keys have transformers' defaults.

    Raises:
      ValueError: if a key is out of range or asks for an unsupported DeBERTa.
    """
    width = fields.integer("hidden_size", 1536)
    heads = fields.integer("num_attention_heads", 24)
    for key in ("embedding_size", "pooler_hidden_size"):
        fields.only(key, width)
    fields.only("attention_head_size", width // max(heads, 1))
    longest = fields.integer("max_position_embeddings", 512)
    types = fields.integer("type_vocab_size", 0)
    return {
        "vocab_size": fields.integer("vocab_size", 128100),
        "hidden_size": width,
        "num_layers": fields.layers("num_hidden_layers", 24),
        "num_heads": heads,
        "mlp_size": fields.integer("intermediate_size", 6144),
        "max_positions": longest,
        "has_positions": fields.flag("position_biased_input", True),
        "num_token_types": types if types != 0 else None,
        "activation": fields.text("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps", 1e-7),
        "pooler_activation": fields.text("pooler_hidden_act", "gelu"),
        "disentangled": _disentangled(fields, longest),
        "conv": _conv(fields, width),
    }


def _disentangled(fields: Fields, longest: int) -> Disentangled | None:
    """Reads which scores of distances there are."""
    kinds = fields.config.get("pos_att_type") or []
    if isinstance(kinds, str):
        kinds = [kind.strip() for kind in kinds.lower().split("|")]
    if not isinstance(kinds, list) or any(kind not in TYPES for kind in kinds):
        fields.faults.append(f"pos_att_type must be of {TYPES}; got {kinds!r}"[:200])
        return None
    is_relative = fields.flag("relative_attention")
    if is_relative != bool(kinds):
        fields.faults.append(
            f"relative_attention must be {bool(kinds)} with pos_att_type = {kinds}; "
            f"got {is_relative}"
        )
    if not is_relative:
        return None
    farthest = fields.integer("max_relative_positions", -1)
    farthest = longest if farthest < 1 else farthest
    buckets = fields.integer("position_buckets", -1)
    has_buckets = buckets > 0
    if has_buckets and (buckets < 2 or farthest <= buckets // 2 + 1):
        fields.faults.append(
            "position_buckets must be at least 2, and half of it under "
            f"max_relative_positions - 1 = {farthest - 1}; got {buckets}"
        )
    span = buckets if has_buckets else farthest
    return Disentangled(
        span=min(max(span, 1), MAX_SIZE),
        max_distance=farthest if has_buckets else None,
        has_c2p="c2p" in kinds,
        has_p2c="p2c" in kinds,
        is_shared=fields.flag("share_att_key"),
        has_norm="layer_norm" in fields.text("norm_rel_ebd", "none").lower(),
    )


def _conv(fields: Fields, width: int) -> ConvConfig | None:
    """Reads the convolution beside the first block, if there is one."""
    size = fields.integer("conv_kernel_size", 0)
    if size <= 0:
        return None
    groups = fields.integer("conv_groups", 1)
    activation = fields.text("conv_act", "tanh")
    if size % 2 == 0:
        fields.faults.append(f"conv_kernel_size must be odd; got {size}")
    if groups < 1 or width % groups:
        fields.faults.append(
            f"conv_groups must divide hidden_size = {width}; got {groups}"
        )
    if activation not in POOLERS[1:]:
        fields.faults.append(
            f"conv_act must be one of {POOLERS[1:]}; got {activation!r}"
        )
    return ConvConfig(size=size, groups=groups, activation=activation)


ATTENTION = LAYER + "attention.self."
DEBERTA = text_family(
    read_deberta,
    SHARED
    | {
        "encoder/distances": "encoder.rel_embeddings",
        "encoder/distance_norm": "encoder.LayerNorm",
        "encoder/conv/conv": "encoder.conv.conv",
        "encoder/conv/norm": "encoder.conv.LayerNorm",
        "encoder/layer_{i}/attention/query": ATTENTION + "query_proj",
        "encoder/layer_{i}/attention/key": ATTENTION + "key_proj",
        "encoder/layer_{i}/attention/value": ATTENTION + "value_proj",
        "encoder/layer_{i}/attention/distance_query": ATTENTION + "pos_query_proj",
        "encoder/layer_{i}/attention/distance_key": ATTENTION + "pos_key_proj",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
    prefix="deberta.",
    unused=(
        *(r"pooler\.dense\.", r"embeddings\.position_embeddings\."),
        *(r"cls\.", r"lm_predictions\.", r"mask_predictions\."),
    ),
    head=("classifier", "pooler"),
)
