"""ModernBERT: pre-norm, rotary positions, windows in most layers, a gated MLP."""

from typing import Any

from lora_jax.models.encoder import SequenceClassifier
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.families.llama import attention_biases, sliding_layers
from lora_jax.models.families.rope import read_ropes
from lora_jax.models.family import Family, token_inputs
from lora_jax.models.fields import Fields, config_reader


@config_reader(EncoderConfig, "ModernBERT encoder")
def read_modernbert(fields: Fields) -> dict[str, Any]:
    """Reads a ModernBERT config, in the keys of transformers 4 or 5.

    Absent keys have transformers' defaults.

    Raises:
      ValueError: if a key is out of range or asks for an unsupported ModernBERT.
    """
    width = fields.integer("hidden_size", 768)
    heads = max(fields.integer("num_attention_heads", 12), 1)
    layers = fields.layers("num_hidden_layers", 22)
    fields.only("rope_scaling", None)
    full, local = read_ropes(
        fields,
        width // heads,
        theta=fields.number("global_rope_theta", 160000.0),
        local_theta=fields.number("local_rope_theta", 10000.0),
    )
    if "longrope" in (full.kind, local.kind):
        fields.faults.append("rope_type must not be 'longrope' here")
    if width // heads % 2:
        fields.faults.append(
            f"hidden_size / num_attention_heads must be even; got {width} / {heads}"
        )
    period = fields.integer("global_attn_every_n_layers", 3)
    both_sides = fields.integer("local_attention", 128)
    for name, value, least in (
        ("global_attn_every_n_layers", period, 1),
        ("local_attention", both_sides, 0),
    ):
        if value < least:
            fields.faults.append(f"{name} must be at least {least}; got {value}")
    windows = sliding_layers(
        fields, layers, lambda i: i % max(period, 1) == 0, both_sides // 2 + 1
    )
    return {
        "vocab_size": fields.integer("vocab_size", 50368),
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_size": fields.integer("intermediate_size", 1152),
        "max_positions": fields.integer("max_position_embeddings", 8192),
        "activation": fields.text("hidden_activation", "gelu"),
        "norm_eps": fields.number("norm_eps", 1e-5),
        "has_norm_bias": fields.flag("norm_bias"),
        "has_mlp_bias": fields.flag("mlp_bias"),
        "pooler_activation": fields.text("classifier_activation", "gelu"),
        "pooler_input": fields.text("classifier_pooling", "cls"),
        "has_pooler_bias": fields.flag("classifier_bias"),
        **attention_biases(fields),
        "is_qkv_fused": True,
        "is_gated": True,
        "norm_placement": "pre",
        "has_first_norm": False,
        "has_positions": False,
        "num_token_types": None,
        "has_pooler_norm": True,
        "layer_ropes": tuple(full if window is None else local for window in windows),
        "layer_windows": windows,
    }


LAYER = "layers.{i}."

MODERNBERT = Family(
    read_config=read_modernbert,
    module=SequenceClassifier,
    inputs=lambda _: token_inputs(2),
    modules={
        "encoder/embeddings/word": "embeddings.tok_embeddings",
        "encoder/embeddings/norm": "embeddings.norm",
        "encoder/layer_{i}/attention_norm": LAYER + "attn_norm",
        "encoder/layer_{i}/attention/qkv": LAYER + "attn.Wqkv",
        "encoder/layer_{i}/attention/output": LAYER + "attn.Wo",
        "encoder/layer_{i}/mlp_norm": LAYER + "mlp_norm",
        "encoder/layer_{i}/mlp/gate_up": LAYER + "mlp.Wi",
        "encoder/layer_{i}/mlp/gated_down": LAYER + "mlp.Wo",
        "encoder/final_norm": "final_norm",
        "pooler": "head.dense",
        "pooler_norm": "head.norm",
        "classifier": "classifier",
    },
    prefix="model.",
    unused=(r"classifier\.", r"head\.", r"decoder\."),
    head=("classifier", "pooler", "pooler_norm"),
)
