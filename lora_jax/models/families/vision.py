"""ViT and DINOv2: pre-norm encoders of image patches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.encoder import ImageClassifier
from lora_jax.models.encoder_config import ImageEncoderConfig
from lora_jax.models.family import Family, Fields

Config = Mapping[str, Any]


def read_vit(config: Config) -> ImageEncoderConfig:
    """Reads a ViT config; absent keys have transformers' defaults."""
    fields = Fields(config, "ViT encoder")
    arguments = _read_sizes(fields, image=224, patch=16, eps=1e-12)
    arguments["mlp_size"] = fields.integer("intermediate_size", 3072)
    fields.check()
    return ImageEncoderConfig(**arguments)


def read_dinov2(config: Config) -> ImageEncoderConfig:
    """Reads a DINOv2 config: layer scale, any grid of positions, maybe a gated MLP."""
    fields = Fields(config, "DINOv2 encoder")
    arguments = _read_sizes(fields, image=224, patch=14, eps=1e-6)
    width = int(arguments["hidden_size"] * fields.number("mlp_ratio", 4))
    is_gated = fields.flag("use_swiglu_ffn")
    if is_gated:
        width = (int(width * 2 / 3) + 7) // 8 * 8
        arguments["activation"] = "silu"
    fields.check()
    return ImageEncoderConfig(
        **arguments,
        mlp_size=width,
        is_gated=is_gated,
        has_layer_scale=True,
        is_resizable=True,
    )


def _read_sizes(fields: Fields, *, image: int, patch: int, eps: float) -> dict:
    """Reads the keys that both families share."""
    image_height, image_width = read_pair(fields, "image_size", image)
    patch_height, patch_width = read_pair(fields, "patch_size", patch)
    return {
        "hidden_size": fields.integer("hidden_size", 768),
        "num_layers": fields.layers("num_hidden_layers", 12),
        "num_heads": fields.integer("num_attention_heads", 12),
        "activation": fields.text("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps", eps),
        "has_qkv_bias": fields.flag("qkv_bias", True),
        "image_height": image_height,
        "image_width": image_width,
        "patch_height": patch_height,
        "patch_width": patch_width,
        "num_channels": fields.integer("num_channels", 3),
    }


def read_pair(fields: Fields, key: str, default: int) -> tuple[int, int]:
    """Reads a size: one integer for height and width, or a list of the two."""
    if not isinstance(pair := fields.config.get(key), list):
        size = fields.integer(key, default)
        return size, size
    if len(pair) != 2 or any(type(size) is not int for size in pair):
        fields.faults.append(f"{key} must be an integer or two; got {pair!r}"[:200])
        return default, default
    return pair[0], pair[1]


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
