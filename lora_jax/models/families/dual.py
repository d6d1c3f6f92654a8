"""CLIP and SigLIP: encoders of images and texts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.dual import DualConfig, DualEncoder
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.models.families.vision import image_inputs, read_pair
from lora_jax.models.family import Family, Fields

Config = Mapping[str, Any]
TEXT, VISION = "text_config", "vision_config"
OLD_END = 2  # of the first CLIP configs, whose texts end at the largest id


def read_clip(config: Config) -> DualConfig:
    """Reads a CLIP config: a class token, and texts read forwards to their end."""
    return _read(config, is_siglip=False)


def read_siglip(config: Config) -> DualConfig:
    """Reads a SigLIP (or fixed-size SigLIP 2) config: pooling by attention."""
    return _read(config, is_siglip=True)


def _read(config: Config, *, is_siglip: bool) -> DualConfig:
    what = "SigLIP model" if is_siglip else "CLIP model"
    whole = Fields(config, what)

    def part(key: str) -> Fields:
        # Old files may have the real values, without defaults, beside the others.
        nested = whole.mapping(f"{key}_dict") or whole.mapping(key) or {}
        own = Fields(nested, what)
        own.faults = whole.faults
        return own

    words, images = part(TEXT), part(VISION)
    width = words.integer("hidden_size", 768 if is_siglip else 512)
    if is_siglip:
        images.only("vision_use_head", True)
        width_out = words.integer("projection_size", width)
        same = images.integer("hidden_size", 768)
        if width_out != same:
            whole.faults.append(
                f"projection_size of {TEXT} must be hidden_size of {VISION} = {same}; "
                f"got {width_out}"
            )
    else:
        width_out = whole.integer("projection_dim", 512)
    text, end, padding = read_text(words, is_siglip=is_siglip)
    vision = read_images(images, is_siglip=is_siglip)
    whole.check()
    return DualConfig(
        vision=ImageEncoderConfig(**vision),
        text=EncoderConfig(**text),
        width=width_out,
        is_siglip=is_siglip,
        end_id=end,
        padding_id=padding,
    )


def read_text(
    words: Fields, *, is_siglip: bool
) -> tuple[dict[str, Any], int | None, int]:
    """Reads a text encoder: its `EncoderConfig`, and its tokens of end and padding."""
    end = words.integer("eos_token_id", 49407)
    own = (12, 3072) if is_siglip else (8, 2048)  # heads, MLP
    width = words.integer("hidden_size", 768 if is_siglip else 512)
    text = _sizes(words, width, *own, is_siglip=is_siglip) | {
        "vocab_size": words.integer("vocab_size", 32000 if is_siglip else 49408),
        "max_positions": words.integer(
            "max_position_embeddings", 64 if is_siglip else 77
        ),
        "num_token_types": None,
        "pooler_activation": None,
        "norm_placement": "pre",
        "has_embedding_norm": False,
        "is_causal": not is_siglip,
    }
    padding = words.integer("pad_token_id", 1)
    return text, None if end == OLD_END else end, padding


def read_images(images: Fields, *, is_siglip: bool) -> dict[str, Any]:
    """Reads an image encoder's `ImageEncoderConfig`."""
    height, across = read_pair(images, "image_size", 224)
    tall, wide = read_pair(images, "patch_size", 16 if is_siglip else 32)
    own = (images.integer("hidden_size", 768), 12, 3072)
    return _sizes(images, *own, is_siglip=is_siglip) | {
        "image_height": height,
        "image_width": across,
        "patch_height": tall,
        "patch_width": wide,
        "num_channels": images.integer("num_channels", 3),
        "is_flat": True,
        "has_class_token": not is_siglip,
        "has_patch_bias": is_siglip,
        "has_embedding_norm": not is_siglip,
        "has_final_norm": is_siglip,
    }


def _sizes(
    fields: Fields, width: int, heads: int, mlp: int, *, is_siglip: bool
) -> dict[str, Any]:
    """Reads the keys that both encoders share."""
    return {
        "hidden_size": width,
        "num_layers": fields.layers("num_hidden_layers", 12),
        "num_heads": fields.integer("num_attention_heads", heads),
        "mlp_size": fields.integer("intermediate_size", mlp),
        "activation": fields.text(
            "hidden_act", "gelu_pytorch_tanh" if is_siglip else "quick_gelu"
        ),
        "norm_eps": fields.number("layer_norm_eps", 1e-6 if is_siglip else 1e-5),
    }


def dual_inputs(config: DualConfig) -> tuple[Any, ...]:
    """Returns the shapes of one text, its mask and one image."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return (ids, ids, *image_inputs(config.vision))


def tower_names(ours: str, theirs: str, final: str) -> dict[str, str]:
    """Names an encoder's modules."""
    layer = theirs + "encoder.layers.{i}."
    pairs = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/output": "self_attn.out_proj",
        "attention_norm": "layer_norm1",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
        "mlp_norm": "layer_norm2",
    }
    return {
        f"{ours}layer_{{i}}/{path}": layer + name for path, name in pairs.items()
    } | {f"{ours}final_norm": theirs + final}


IMAGES, TEXTS, HEAD = "vision_model.", "text_model.", "vision_model.head."
SHARED = (
    tower_names("vision/", IMAGES, "post_layernorm")
    | tower_names("text/", TEXTS, "final_layer_norm")
    | {
        "vision/embeddings/patch": IMAGES + "embeddings.patch_embedding",
        "vision/embeddings/position": IMAGES + "embeddings.position_embedding",
        "text/embeddings/word": TEXTS + "embeddings.token_embedding",
        "text/embeddings/position": TEXTS + "embeddings.position_embedding",
        "logit_scale": "logit_scale",
        "classifier": "classifier",  # of neither: see `DualEncoder.num_labels`
    }
)


def dual_family(read: Any, modules: Mapping[str, str]) -> Family:
    """Makes a family of `DualEncoder`."""
    return Family(
        read_config=read,
        module=DualEncoder,
        inputs=dual_inputs,
        modules={**SHARED, **modules},
        prefix="",
        unused=(r"(vision|text)_model\.embeddings\.position_ids",),
        head=("classifier",),
        head_pooling="mean",
        head_class="ForImageClassification",
    )


CLIP = dual_family(
    read_clip,
    {
        "vision/embeddings/cls": IMAGES + "embeddings.class_embedding",
        "vision/embeddings/norm": IMAGES + "pre_layrnorm",  # spelled so
        "vision_norm": IMAGES + "post_layernorm",
        "visual_projection": "visual_projection",
        "text_projection": "text_projection",
    },
)
SIGLIP = dual_family(
    read_siglip,
    {
        "vision_head/probe": HEAD + "probe",
        "vision_head/in_proj": HEAD + "attention.in_proj",
        "vision_head/in_proj/kernel": HEAD + "attention.in_proj_weight",
        "vision_head/in_proj/bias": HEAD + "attention.in_proj_bias",
        "vision_head/output": HEAD + "attention.out_proj",
        "vision_head/norm": HEAD + "layernorm",
        "vision_head/up": HEAD + "mlp.fc1",
        "vision_head/down": HEAD + "mlp.fc2",
        "text_head": TEXTS + "head",
        "logit_bias": "logit_bias",
    },
)
