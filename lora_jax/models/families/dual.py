"""CLIP and SigLIP: encoders of images and texts, of both or each in its own folder."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dual import (
    DualConfig,
    DualEncoder,
    ImageTower,
    ImageTowerConfig,
    TextTower,
    TextTowerConfig,
)
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.models.families.vision import image_inputs, read_image
from lora_jax.models.family import Family, architecture, token_inputs
from lora_jax.models.fields import Fields, config_reader

Arguments = dict[str, Any]
TEXT, VISION = "text_config", "vision_config"
OLD_END = 2  # of the first CLIP configs, whose texts end at the largest id
# What absent keys mean in transformers, of images and of texts.
CLIP_IMAGES = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_TEXTS = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_IMAGES = {"patch_size": 16}
SIGLIP_TEXTS = {"vocab_size": 32000, "max_position_embeddings": 64}


def make_dual(text: Arguments, vision: Arguments, **options: Any) -> DualConfig:
    """Makes a `DualConfig` of the arguments of its two encoders' configs."""
    images, texts = ImageEncoderConfig(**vision), EncoderConfig(**text)
    return DualConfig(vision=images, text=texts, **options)


@config_reader(make_dual, "CLIP model")
def read_clip(whole: Fields) -> Arguments:
    """Reads a CLIP config: a class token, and texts read forwards to their end."""
    words = _part(whole, TEXT, CLIP_TEXTS)
    end, padding = _ends(words)
    return {
        "text": _read_text(words, is_siglip=False),
        "vision": _read_images(_part(whole, VISION, CLIP_IMAGES), is_siglip=False),
        "width": whole.integer("projection_dim", 512),
        "end_id": end,
        "padding_id": padding,
    }


@config_reader(make_dual, "SigLIP model")
def read_siglip(whole: Fields) -> Arguments:
    """Reads a SigLIP (or fixed-size SigLIP 2) config: pooling by attention."""
    words = _part(whole, TEXT, SIGLIP_TEXTS)
    text = _read_text(words, is_siglip=True)
    vision = _read_images(_part(whole, VISION, SIGLIP_IMAGES), is_siglip=True)
    width, same = _siglip_width(words, text), vision["hidden_size"]
    if width != same:
        whole.faults.append(
            f"projection_size of {TEXT} must be hidden_size of {VISION} = {same}; "
            f"got {width}"
        )
    end, padding = _ends(words)
    return {
        "text": text,
        "vision": vision,
        "width": width,
        "is_siglip": True,
        "end_id": end,
        "padding_id": padding,
    }


@config_reader(TextTowerConfig, "CLIP text encoder", **CLIP_TEXTS)
def read_clip_text(fields: Fields) -> Arguments:
    """Reads a CLIPTextModel, with a projection or without."""
    end, padding = _ends(fields)
    return _read_text(fields, is_siglip=False) | {
        "width": _projection(fields),
        "end_id": end,
        "fill_id": padding,
    }


@config_reader(TextTowerConfig, "SigLIP text encoder", **SIGLIP_TEXTS)
def read_siglip_text(fields: Fields) -> Arguments:
    """Reads a SiglipTextModel."""
    text, (end, padding) = _read_text(fields, is_siglip=True), _ends(fields)
    return text | {
        "is_siglip": True,
        "width": _siglip_width(fields, text),
        "end_id": end,
        "fill_id": padding,
    }


@config_reader(ImageTowerConfig, "CLIP image encoder", **CLIP_IMAGES)
def read_clip_vision(fields: Fields) -> Arguments:
    """Reads a CLIPVisionModel, with a projection or without."""
    return _read_images(fields, is_siglip=False) | {"width": _projection(fields)}


@config_reader(ImageTowerConfig, "SigLIP image encoder", **SIGLIP_IMAGES)
def read_siglip_vision(fields: Fields) -> Arguments:
    """Reads a SiglipVisionModel."""
    return _read_images(fields, is_siglip=True) | {"is_siglip": True}


def _part(whole: Fields, key: str, defaults: Mapping[str, Any]) -> Fields:
    # Old files may have the real values, without defaults, beside the others.
    nested = whole.mapping(f"{key}_dict") or whole.mapping(key) or {}
    return whole.nested(nested, defaults)


def _read_text(words: Fields, *, is_siglip: bool) -> Arguments:
    """Reads a text encoder's `EncoderConfig`."""
    return _sizes(words) | {
        "vocab_size": words.integer("vocab_size"),
        "max_positions": words.integer("max_position_embeddings"),
        "num_token_types": None,
        "pooler_activation": None,
        "norm_placement": "pre",
        "has_embedding_norm": False,
        "is_causal": not is_siglip,
    }


def _ends(words: Fields) -> tuple[int | None, int]:
    """Reads the tokens of a text's end and of padding."""
    end = words.integer("eos_token_id", 49407)
    return None if end == OLD_END else end, words.integer("pad_token_id", 1)


def _read_images(images: Fields, *, is_siglip: bool) -> Arguments:
    """Reads an image encoder's `ImageEncoderConfig`."""
    if is_siglip:
        images.only("vision_use_head", True)
    return _sizes(images) | {
        **read_image(images),
        "is_flat": True,
        "has_class_token": not is_siglip,
        "has_patch_bias": is_siglip,
        "has_embedding_norm": not is_siglip,
        "has_final_norm": is_siglip,
    }


def _sizes(fields: Fields) -> Arguments:
    """Reads the keys that both encoders share."""
    return {
        "hidden_size": fields.integer("hidden_size", 768),
        "num_layers": fields.layers("num_hidden_layers", 12),
        "num_heads": fields.integer("num_attention_heads", 12),
        "mlp_size": fields.integer("intermediate_size", 3072),
        "activation": fields.text("hidden_act", "gelu_pytorch_tanh"),
        "norm_eps": fields.number("layer_norm_eps", 1e-6),
    }


def _siglip_width(words: Fields, text: Arguments) -> int:
    return words.integer("projection_size", text["hidden_size"])


def _projection(fields: Fields) -> int | None:
    """Returns the width of CLIP's projection, if the class named has one."""
    is_projected = architecture(fields.config).endswith("WithProjection")
    return fields.integer("projection_dim", 512) if is_projected else None


LAYER = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}
POSITION = {"embeddings/position": "embeddings.position_embedding"}
WORDS = POSITION | {
    "embeddings/word": "embeddings.token_embedding",
    "final_norm": "final_layer_norm",
}
PATCHES = POSITION | {
    "embeddings/patch": "embeddings.patch_embedding",
    "final_norm": "post_layernorm",
}
CLASS_TOKEN = {  # CLIP's
    "embeddings/cls": "embeddings.class_embedding",
    "embeddings/norm": "pre_layrnorm",  # spelled so
}
POOL = {  # SigLIP's
    "probe": "probe",
    "in_proj": "attention.in_proj",
    "in_proj/kernel": "attention.in_proj_weight",
    "in_proj/bias": "attention.in_proj_bias",
    "output": "attention.out_proj",
    "norm": "layernorm",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def names(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Puts prefixes before the paths and names of modules."""
    return {ours + path: theirs + name for path, name in modules.items()}


def encoder_names(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Names an encoder's modules, those of its layers too."""
    layers = names(f"{ours}layer_{{i}}/", theirs + "encoder.layers.{i}.", LAYER)
    return layers | names(ours, theirs, modules)


def clip_family(
    read_config: Any,
    module: Any,
    inputs: Any,
    modules: Mapping[str, str],
    *,
    prefix: str = "",
    head_class: str = "Model, WithProjection",
) -> Family:
    """Makes a family of encoders of embeddings; arguments are `Family`'s."""
    return Family(
        read_config=read_config,
        module=module,
        inputs=inputs,
        # No folder has the head: see `num_labels`.
        modules={**modules, "classifier": "classifier"},
        prefix=prefix,
        unused=(r"((vision|text)_model\.)?embeddings\.position_ids",),
        head=("classifier",),
        head_pooling="mean",
        head_class=head_class,
    )


IMAGES, TEXTS = "vision_model.", "text_model."
BOTH = encoder_names("vision/", IMAGES, PATCHES) | encoder_names("text/", TEXTS, WORDS)
CLIP = clip_family(
    read_clip,
    DualEncoder,
    lambda config: (*token_inputs(2), *image_inputs(config.vision)),
    BOTH
    | names("vision/", IMAGES, CLASS_TOKEN)
    | {
        "logit_scale": "logit_scale",
        "vision_norm": IMAGES + "post_layernorm",
        "visual_projection": "visual_projection",
        "text_projection": "text_projection",
    },
    head_class="ForImageClassification",
)
SIGLIP = clip_family(
    read_siglip,
    DualEncoder,
    lambda config: (*token_inputs(2), *image_inputs(config.vision)),
    BOTH
    | names("vision_head/", IMAGES + "head.", POOL)
    | {
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "text_head": TEXTS + "head",
    },
    head_class="ForImageClassification",
)
CLIP_TEXT = clip_family(
    read_clip_text,
    TextTower,
    lambda _: token_inputs(2),
    encoder_names("encoder/", "", WORDS) | {"projection": "text_projection"},
    prefix=TEXTS,
)
SIGLIP_TEXT = clip_family(
    read_siglip_text,
    TextTower,
    lambda _: token_inputs(2),
    encoder_names("encoder/", "", WORDS) | {"projection": "head"},
    prefix=TEXTS,
)
CLIP_VISION = clip_family(
    read_clip_vision,
    ImageTower,
    image_inputs,
    encoder_names("encoder/", "", PATCHES | CLASS_TOKEN)
    | {"image_norm": "post_layernorm", "projection": "visual_projection"},
    prefix=IMAGES,
)
SIGLIP_VISION = clip_family(
    read_siglip_vision,
    ImageTower,
    image_inputs,
    encoder_names("encoder/", "", PATCHES) | names("image_head/", "head.", POOL),
    prefix=IMAGES,
)
