"""The BERT family: how Hugging Face names its config keys and its tensors.

A family is what `load_model` needs to know about a ``model_type``: how to read the
config, which module to build, and which tensor each leaf of the module's tree comes
from. Another family is another file like this one and a line in `load.FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from lora_jax.models.encoder import EncoderConfig, SequenceClassifier


class Family(NamedTuple):
    """What there is to know about one ``model_type`` of Hugging Face.

    Attributes:
      read_config: from a parsed ``config.json`` to the module's config.
      module: called with (config, num_labels=, pooling=, dtype=); builds the module.
      modules: from a module's path in our tree, with ``{i}`` for a layer's number, to
        its Hugging Face name.
      prefix: what the names start with in files saved from a larger model.
      unused: prefixes of names that a file may hold and the module doesn't need.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., nn.Module]
    modules: Mapping[str, str]
    prefix: str
    unused: tuple[str, ...]


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
    required = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_size",
    }
    # The defaults are those of transformers' BertConfig, for keys a file leaves out.
    optional = {
        "max_position_embeddings": ("max_positions", 512),
        "type_vocab_size": ("num_token_types", 2),
        "hidden_act": ("activation", "gelu"),
        "layer_norm_eps": ("norm_eps", 1e-12),
    }
    only = {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    }
    faults = [f"{key} is missing" for key in required if key not in config]
    faults += [
        f"{key} must be {value!r} here; got {config[key]!r}"
        for key, value in only.items()
        if config.get(key, value) != value
    ]
    if faults:
        raise ValueError(
            "config.json is not of a BERT encoder: " + "; ".join(faults) + "."
        )
    fields = {ours: config[key] for key, ours in required.items()}
    fields |= {ours: config.get(key, value) for key, (ours, value) in optional.items()}
    return EncoderConfig(**fields)


BERT = Family(
    read_config=read_config,
    module=SequenceClassifier,
    modules={
        "encoder/embeddings/word": "embeddings.word_embeddings",
        "encoder/embeddings/position": "embeddings.position_embeddings",
        "encoder/embeddings/token_type": "embeddings.token_type_embeddings",
        "encoder/embeddings/norm": "embeddings.LayerNorm",
        "encoder/layer_{i}/attention/query": "encoder.layer.{i}.attention.self.query",
        "encoder/layer_{i}/attention/key": "encoder.layer.{i}.attention.self.key",
        "encoder/layer_{i}/attention/value": "encoder.layer.{i}.attention.self.value",
        "encoder/layer_{i}/attention/output": (
            "encoder.layer.{i}.attention.output.dense"
        ),
        "encoder/layer_{i}/attention_norm": (
            "encoder.layer.{i}.attention.output.LayerNorm"
        ),
        "encoder/layer_{i}/mlp/up": "encoder.layer.{i}.intermediate.dense",
        "encoder/layer_{i}/mlp/down": "encoder.layer.{i}.output.dense",
        "encoder/layer_{i}/mlp_norm": "encoder.layer.{i}.output.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
    prefix="bert.",
    unused=("embeddings.position_ids", "pooler.dense.", "classifier.", "cls."),
)
