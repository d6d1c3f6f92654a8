"""Language models of multimodal folders: Gemma 3 and 4, Mistral 3, Qwen.

Text in, text out. The config of the language model is ``text_config``, its tensors are
under ``language_model``; what belongs to images stays on disk. Positions that count
time, height and width apart (M-RoPE) are one number for text: plain RoPE.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.dense import MINISTRAL3
from lora_jax.models.families.gemma import GEMMA3
from lora_jax.models.families.gemma4 import GEMMA4
from lora_jax.models.families.hybrids import QWEN3_5, QWEN3_5_MOE
from lora_jax.models.families.llama import MISTRAL, QWEN2, QWEN3
from lora_jax.models.family import OTHER_MODALITIES, Family
from lora_jax.models.fields import Fields

Config = Mapping[str, Any]
TEXT, KIND, TIED = "text_config", "model_type", "tie_word_embeddings"
ROPES = ("rope_scaling", "rope_parameters")


def multimodal_family(texts: Mapping[str, Family], **defaults: Any) -> Family:
    """Makes the family of a multimodal model that is read as its language model.

    Args:
      texts: families by the ``model_type`` of ``text_config``; the first if it has
        none. Their modules are the same.
      **defaults: what an absent key of ``text_config`` means.

    Returns:
      The family.
    """
    first = next(iter(texts))

    def read(config: Config) -> DecoderConfig:
        text = text_settings(config)
        kind = text.get(KIND, first)
        if not isinstance(kind, str) or kind not in texts:
            fields = Fields(config, "language model of a multimodal folder")
            fields.faults.append(
                f"{TEXT}.{KIND} must be one of {sorted(texts)}; got {kind!r}"
            )
            fields.check()
        return texts[kind].read_config({**defaults, **text})

    return dataclasses.replace(
        texts[first],
        read_config=read,
        prefix="model.language_model.",
        prefixes=("language_model.model.", "language_model.", "model.", ""),
        unused=(*texts[first].unused, *OTHER_MODALITIES),
        is_multimodal=True,
    )


def text_settings(config: Config) -> dict[str, Any]:
    """Returns the language model's part of a ``config.json``.

    Args:
      config: with ``text_config``, or flat, as Qwen2.5-VL's first folders have it.

    Returns:
      Its settings; ``tie_word_embeddings`` may be the whole's. M-RoPE is plain RoPE.

    Raises:
      ValueError: if ``text_config`` is not an object.

    Example:
      >>> whole = {"tie_word_embeddings": True, "text_config": {"hidden_size": 4}}
      >>> text_settings(whole)
      {'tie_word_embeddings': True, 'hidden_size': 4}
    """
    fields = Fields(config, "language model of a multimodal folder")
    nested = fields.mapping(TEXT)
    fields.check()
    if nested is None:
        text = {key: config[key] for key in config if key != KIND}
    else:
        text = {key: config[key] for key in (TIED,) if key in config} | nested
    for key in ROPES:
        rope = text.get(key)
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
            kind = "default" if kind == "mrope" else kind
            text[key] = {**rope, "rope_type": kind}
    return text


GEMMA3_FOLDER = multimodal_family(
    {"gemma3_text": GEMMA3},
    vocab_size=262208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
)
GEMMA4_FOLDER = multimodal_family({"gemma4_text": GEMMA4})
MISTRAL3_FOLDER = multimodal_family({"mistral": MISTRAL, "ministral3": MINISTRAL3})
QWEN2_VL_FOLDER = multimodal_family(
    {"qwen2_5_vl_text": QWEN2}, rms_norm_eps=1e-5, rope_theta=1e6, max_window_layers=80
)
QWEN3_VL_FOLDER = multimodal_family(
    {"qwen3_vl_text": QWEN3}, rope_theta=5e5, max_position_embeddings=128000
)
QWEN3_5_FOLDER = multimodal_family({"qwen3_5_text": QWEN3_5})
QWEN3_5_MOE_FOLDER = multimodal_family({"qwen3_5_moe_text": QWEN3_5_MOE})
