"""ViT and DINOv2: pre-norm encoders of image patches."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.encoder import ImageClassifier
from lora_jax.models.encoder_config import ImageEncoderConfig
from lora_jax.models.family import Family
from lora_jax.models.fields import Fields, config_reader


@config_reader(ImageEncoderConfig, "ViT encoder", patch_size=16, layer_norm_eps=1e-12)
def read_vit(fields: Fields) -> dict[str, Any]:
    """Reads a ViT config; absent keys have transformers' defaults."""
    return _read_sizes(fields) | {"mlp_size": fields.integer("intermediate_size", 3072)}


@config_reader(ImageEncoderConfig, "DINOv2 encoder", patch_size=14, layer_norm_eps=1e-6)
def read_dinov2(fields: Fields) -> dict[str, Any]:
    """Reads a DINOv2 config: layer scale, any grid of positions, maybe a gated MLP."""
    sizes = _read_sizes(fields)
    width = int(sizes["hidden_size"] * fields.number("mlp_ratio", 4))
    is_gated = fields.flag("use_swiglu_ffn")
    if is_gated:
        width = (int(width * 2 / 3) + 7) // 8 * 8
        sizes["activation"] = "silu"
    return sizes | {
        "mlp_size": width,
        "is_gated": is_gated,
        "has_layer_scale": True,
        "is_resizable": True,
    }


def _read_sizes(fields: Fields) -> dict[str, Any]:
    """Reads the keys that both families share."""
    return read_image(fields) | {
        "hidden_size": fields.integer("hidden_size", 768),
        "num_layers": fields.layers("num_hidden_layers", 12),
        "num_heads": fields.integer("num_attention_heads", 12),
        "activation": fields.text("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps"),
        "has_qkv_bias": fields.flag("qkv_bias", True),
    }


def read_image(fields: Fields) -> dict[str, Any]:
    """Reads the sizes of images and patches; the patches' have no general default."""
    sizes = {"num_channels": fields.integer("num_channels", 3)}
    for part, default in (("image", 224), ("patch", 1)):
        key = f"{part}_size"
        pair = fields.config.get(key)
        if not isinstance(pair, list):
            pair = [fields.integer(key, default)] * 2
        elif len(pair) != 2 or any(type(size) is not int for size in pair):
            fields.faults.append(f"{key} must be an integer or two; got {pair!r}"[:200])
            pair = [1, 1]
        sizes[f"{part}_height"], sizes[f"{part}_width"] = pair
    return sizes


def image_inputs(config: ImageEncoderConfig) -> tuple[Any, ...]:
    """Returns the shape of one batch of images."""
    size = (config.image_height, config.image_width)
    return (jax.ShapeDtypeStruct((1, config.num_channels, *size), jnp.float32),)


LAYER = "encoder.layer.{i}."
SHARED = {
    "encoder/embeddings/cls": "embeddings.cls_token",
    "encoder/embeddings/position": "embeddings.position_embeddings",
    "encoder/embeddings/patch": "embeddings.patch_embeddings.projection",
    "encoder/layer_{i}/attention/query": LAYER + "attention.attention.query",
    "encoder/layer_{i}/attention/key": LAYER + "attention.attention.key",
    "encoder/layer_{i}/attention/value": LAYER + "attention.attention.value",
    "encoder/layer_{i}/attention/output": LAYER + "attention.output.dense",
    "encoder/final_norm": "layernorm",
    "classifier": "classifier",
}
ATTENTION_RENAMES = (
    (r"attention\.attention\.query$", "attention.q_proj"),
    (r"attention\.attention\.key$", "attention.k_proj"),
    (r"attention\.attention\.value$", "attention.v_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
)

VIT = Family(
    read_config=read_vit,
    module=ImageClassifier,
    inputs=image_inputs,
    modules=SHARED
    | {
        "encoder/layer_{i}/attention_norm": LAYER + "layernorm_before",
        "encoder/layer_{i}/mlp/up": LAYER + "intermediate.dense",
        "encoder/layer_{i}/mlp/down": LAYER + "output.dense",
        "encoder/layer_{i}/mlp_norm": LAYER + "layernorm_after",
    },
    prefix="vit.",
    unused=(r"pooler\.dense\.", r"classifier\.", r"embeddings\.mask_token"),
    head=("classifier",),
    head_pooling="cls",
    head_class="ForImageClassification",
    renames=(
        *ATTENTION_RENAMES,
        (r"intermediate\.dense$", "mlp.fc1"),
        (r"output\.dense$", "mlp.fc2"),
        (r"^encoder\.layer\.", "layers."),
    ),
)
DINOV2 = Family(
    read_config=read_dinov2,
    module=ImageClassifier,
    inputs=image_inputs,
    modules=SHARED
    | {
        "encoder/layer_{i}/attention_norm": LAYER + "norm1",
        "encoder/layer_{i}/attention_scale": LAYER + "layer_scale1.lambda1",
        "encoder/layer_{i}/mlp/up": LAYER + "mlp.fc1",
        "encoder/layer_{i}/mlp/down": LAYER + "mlp.fc2",
        "encoder/layer_{i}/mlp/gate_up": LAYER + "mlp.weights_in",
        "encoder/layer_{i}/mlp/gated_down": LAYER + "mlp.weights_out",
        "encoder/layer_{i}/mlp_norm": LAYER + "norm2",
        "encoder/layer_{i}/mlp_scale": LAYER + "layer_scale2.lambda1",
    },
    prefix="dinov2.",
    unused=(r"classifier\.", r"embeddings\.mask_token"),
    head=("classifier",),
    head_pooling="cls_mean",
    head_class="ForImageClassification",
    renames=(*ATTENTION_RENAMES, (r"mlp\.weights_out$", "mlp.down_proj")),
)
