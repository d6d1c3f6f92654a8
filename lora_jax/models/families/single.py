"""The encoders of CLIP and SigLIP in folders of their own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.families.dual import read_images, read_text, tower_names
from lora_jax.models.families.vision import image_inputs
from lora_jax.models.family import Family, Fields
from lora_jax.models.tower import (
    ImageTower,
    ImageTowerConfig,
    TextTower,
    TextTowerConfig,
)

Config = Mapping[str, Any]


def read_clip_text(config: Config) -> TextTowerConfig:
    """Reads a CLIPTextModel, with a projection or without."""
    return _read_text(config, "CLIP text encoder", is_siglip=False)


def read_siglip_text(config: Config) -> TextTowerConfig:
    """Reads a SiglipTextModel."""
    return _read_text(config, "SigLIP text encoder", is_siglip=True)


def read_clip_vision(config: Config) -> ImageTowerConfig:
    """Reads a CLIPVisionModel, with a projection or without."""
    fields = Fields(config, "CLIP image encoder")
    images, width = read_images(fields, is_siglip=False), _projection(fields)
    fields.check()
    return ImageTowerConfig(**images, width=width)


def read_siglip_vision(config: Config) -> ImageTowerConfig:
    """Reads a SiglipVisionModel."""
    fields = Fields(config, "SigLIP image encoder")
    fields.only("vision_use_head", True)
    images = read_images(fields, is_siglip=True)
    fields.check()
    return ImageTowerConfig(**images, is_siglip=True)


def _read_text(config: Config, what: str, *, is_siglip: bool) -> TextTowerConfig:
    fields = Fields(config, what)
    text, end, padding = read_text(fields, is_siglip=is_siglip)
    width = _projection(fields)
    if is_siglip:
        width = fields.integer("projection_size", text["hidden_size"])
    fields.check()
    return TextTowerConfig(
        **text, is_siglip=is_siglip, width=width, end_id=end, fill_id=padding
    )


def _projection(fields: Fields) -> int | None:
    """Returns the width of CLIP's projection, if the class named has one."""
    classes = fields.config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    is_projected = isinstance(first, str) and first.endswith("WithProjection")
    return fields.integer("projection_dim", 512) if is_projected else None


def text_inputs(config: TextTowerConfig) -> tuple[Any, ...]:
    """Returns the shapes of one text and its mask."""
    del config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),) * 2


def _family(read: Any, module: Any, inputs: Any, prefix: str, names: Any) -> Family:
    images = prefix == "vision_model."
    final = "post_layernorm" if images else "final_layer_norm"
    shared = {
        "encoder/embeddings/position": "embeddings.position_embedding",
        "classifier": "classifier",  # of none: see `TextTower.num_labels`
    }
    return Family(
        read_config=read,
        module=module,
        inputs=inputs,
        modules={**tower_names("encoder/", "", final), **shared, **names},
        prefix=prefix,
        unused=(r"embeddings\.position_ids",),
        head=("classifier",),
        head_pooling="mean",
        head_class="Model, WithProjection",
    )


IMAGES, TEXTS = "vision_model.", "text_model."
WORDS = {"encoder/embeddings/word": "embeddings.token_embedding"}
PATCHES = {"encoder/embeddings/patch": "embeddings.patch_embedding"}
CLIP_TEXT = _family(
    read_clip_text,
    TextTower,
    text_inputs,
    TEXTS,
    WORDS | {"projection": "text_projection"},
)
SIGLIP_TEXT = _family(
    read_siglip_text, TextTower, text_inputs, TEXTS, WORDS | {"projection": "head"}
)
CLIP_VISION = _family(
    read_clip_vision,
    ImageTower,
    image_inputs,
    IMAGES,
    PATCHES
    | {
        "encoder/embeddings/cls": "embeddings.class_embedding",
        "encoder/embeddings/norm": "pre_layrnorm",  # spelled so
        "image_norm": "post_layernorm",
        "projection": "visual_projection",
    },
)
SIGLIP_VISION = _family(
    read_siglip_vision,
    ImageTower,
    image_inputs,
    IMAGES,
    PATCHES
    | {
        "image_head/probe": "head.probe",
        "image_head/in_proj": "head.attention.in_proj",
        "image_head/in_proj/kernel": "head.attention.in_proj_weight",
        "image_head/in_proj/bias": "head.attention.in_proj_bias",
        "image_head/output": "head.attention.out_proj",
        "image_head/norm": "head.layernorm",
        "image_head/up": "head.mlp.fc1",
        "image_head/down": "head.mlp.fc2",
    },
)
