"""BERT: post-norm encoder with learned positions and token types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.encoder import SequenceClassifier
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.family import Family, Fields


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Reads the fields of a Hugging Face BERT ``config.json``.

    Args:
      config: the parsed file; keys that don't change the computation are left.

    Returns:
      The config in this library's words.

    Raises:
      ValueError: if a key is missing, out of range, or asks for a BERT that this
        isn't (a decoder, cross-attention, relative positions).

    Example:
      >>> read_config({"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
      ...              "num_attention_heads": 2, "intermediate_size": 8}).mlp_size
      8
    """
    fields = Fields(config, "BERT encoder")
    arguments = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": fields.integer("num_attention_heads"),
        "mlp_size": fields.integer("intermediate_size"),
        # The defaults are those of transformers' BertConfig.
        "max_positions": fields.integer("max_position_embeddings", 512),
        "num_token_types": fields.integer("type_vocab_size", 2),
        "activation": fields.text("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps", 1e-12),
    }
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("position_embedding_type", "absolute")
    fields.check()
    return EncoderConfig(**arguments)


def text_inputs(config: Any) -> tuple[Any, ...]:
    """Shapes of one batch of token ids and its mask."""
    del config
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return ids, ids


LAYER = "encoder.layer.{i}."
BERT = Family(
    read_config=read_config,
    module=SequenceClassifier,
    inputs=text_inputs,
    modules={
        "encoder/embeddings/word": "embeddings.word_embeddings",
        "encoder/embeddings/position": "embeddings.position_embeddings",
        "encoder/embeddings/token_type": "embeddings.token_type_embeddings",
        "encoder/embeddings/norm": "embeddings.LayerNorm",
        "encoder/layer_{i}/attention/query": LAYER + "attention.self.query",
        "encoder/layer_{i}/attention/key": LAYER + "attention.self.key",
        "encoder/layer_{i}/attention/value": LAYER + "attention.self.value",
        "encoder/layer_{i}/attention/output": LAYER + "attention.output.dense",
        "encoder/layer_{i}/attention_norm": LAYER + "attention.output.LayerNorm",
        "encoder/layer_{i}/mlp/up": LAYER + "intermediate.dense",
        "encoder/layer_{i}/mlp/down": LAYER + "output.dense",
        "encoder/layer_{i}/mlp_norm": LAYER + "output.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
    prefix="bert.",
    unused=(r"embeddings\.position_ids", r"pooler\.dense\.", r"classifier\.", r"cls\."),
    head="classifier",
)
