"""BERT, (XLM-)RoBERTa, ELECTRA, MPNet, DistilBERT: post-norm, learned positions."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.models.encoder import SequenceClassifier
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.family import Family, token_inputs
from lora_jax.models.fields import Fields, config_reader

MPNET_BUCKETS, MPNET_PADDING = 32, 1


def _read_sizes(fields: Fields) -> dict[str, Any]:
    """Reads the keys that most of these families share."""
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("position_embedding_type", "absolute")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": fields.integer("num_attention_heads"),
        "mlp_size": fields.integer("intermediate_size"),
        # The defaults are those of transformers' config classes.
        "max_positions": fields.integer("max_position_embeddings", 512),
        "num_token_types": fields.integer("type_vocab_size", 2),
        "activation": fields.text("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps", 1e-12),
    }


@config_reader(EncoderConfig, "BERT encoder")
def read_config(fields: Fields) -> dict[str, Any]:
    """Reads a Hugging Face BERT ``config.json``.

    Raises:
      ValueError: if a key is missing, out of range, or asks for an unsupported BERT (a
        decoder, cross-attention, relative positions).

    Example:
      >>> read_config({"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
      ...              "num_attention_heads": 2, "intermediate_size": 8}).mlp_size
      8
    """
    return _read_sizes(fields)


@config_reader(EncoderConfig, "RoBERTa encoder")
def read_roberta(fields: Fields) -> dict[str, Any]:
    """Reads a RoBERTa config: positions count tokens from the padding id on."""
    sizes, padding = _read_sizes(fields), fields.integer("pad_token_id", 1)
    rows = sizes["max_positions"]
    if not 0 <= padding < rows - 1:
        fields.faults.append(
            f"pad_token_id must be in [0, max_position_embeddings - 1 = {rows - 1}), "
            f"so that positions are left; got {padding}"
        )
    return sizes | {"max_positions": rows - padding - 1, "padding_id": padding}


@config_reader(EncoderConfig, "ELECTRA encoder")
def read_electra(fields: Fields) -> dict[str, Any]:
    """Reads an ELECTRA config: embeddings of their own width, GELU in the head."""
    sizes, width = _read_sizes(fields), fields.integer("embedding_size", 128)
    return sizes | {
        "embedding_size": None if width == sizes["hidden_size"] else width,
        "pooler_activation": "gelu",
    }


@config_reader(EncoderConfig, "MPNet encoder")
def read_mpnet(fields: Fields) -> dict[str, Any]:
    """Reads an MPNet config: biases of distances, no token types, padding's id fixed.

    transformers computes with 32 buckets and the padding id 1 whatever the file says.
    """
    sizes = _read_sizes(fields)
    fields.only("relative_attention_num_buckets", MPNET_BUCKETS)
    rows = sizes["max_positions"]
    if rows < MPNET_PADDING + 2:
        fields.faults.append(
            f"max_position_embeddings must be at least {MPNET_PADDING + 2}, so that "
            f"positions are left; got {rows}"
        )
    return sizes | {
        "max_positions": rows - MPNET_PADDING - 1,
        "num_token_types": None,
        "padding_id": MPNET_PADDING,
        "num_buckets": MPNET_BUCKETS,
    }


@config_reader(EncoderConfig, "DistilBERT encoder")
def read_distilbert(fields: Fields) -> dict[str, Any]:
    """Reads a DistilBERT config: no token types, and a fixed LayerNorm epsilon."""
    return {
        "vocab_size": fields.integer("vocab_size", 30522),
        "hidden_size": fields.integer("dim", 768),
        "num_layers": fields.layers("n_layers", 6),
        "num_heads": fields.integer("n_heads", 12),
        "mlp_size": fields.integer("hidden_dim", 4 * 768),
        "max_positions": fields.integer("max_position_embeddings", 512),
        "activation": fields.text("activation", "gelu"),
        "num_token_types": None,
        "pooler_activation": "relu",
    }


def text_family(
    read: Callable[[Mapping[str, Any]], EncoderConfig],
    modules: Mapping[str, str],
    *,
    prefix: str,
    unused: tuple[str, ...],
    head: tuple[str, ...],
) -> Family:
    """Makes a family of `SequenceClassifier`; arguments are `Family`'s."""
    return Family(
        read_config=read,
        module=SequenceClassifier,
        inputs=lambda _: token_inputs(2),
        modules={
            "encoder/embeddings/word": "embeddings.word_embeddings",
            "encoder/embeddings/position": "embeddings.position_embeddings",
            "encoder/embeddings/norm": "embeddings.LayerNorm",
            **modules,
        },
        prefix=prefix,
        unused=(r"embeddings\.position_ids", r"classifier\.", *unused),
        head=head,
    )


LAYER = "encoder.layer.{i}."
SHARED = {
    "encoder/embeddings/token_type": "embeddings.token_type_embeddings",
    "encoder/layer_{i}/attention/query": LAYER + "attention.self.query",
    "encoder/layer_{i}/attention/key": LAYER + "attention.self.key",
    "encoder/layer_{i}/attention/value": LAYER + "attention.self.value",
    "encoder/layer_{i}/attention/output": LAYER + "attention.output.dense",
    "encoder/layer_{i}/attention_norm": LAYER + "attention.output.LayerNorm",
    "encoder/layer_{i}/mlp/up": LAYER + "intermediate.dense",
    "encoder/layer_{i}/mlp/down": LAYER + "output.dense",
    "encoder/layer_{i}/mlp_norm": LAYER + "output.LayerNorm",
}
ELECTRA = text_family(  # the discriminator; the generator has the same tensors
    read_electra,
    SHARED
    | {
        "encoder/embeddings/projection": "embeddings_project",
        "pooler": "classifier.dense",
        "classifier": "classifier.out_proj",
    },
    prefix="electra.",
    unused=(r"discriminator_predictions\.", r"generator_(predictions|lm_head)\."),
    head=("classifier", "pooler"),
)
MPNET = text_family(
    read_mpnet,
    {
        "encoder/relative_bias": "encoder.relative_attention_bias",
        "encoder/layer_{i}/attention/query": LAYER + "attention.attn.q",
        "encoder/layer_{i}/attention/key": LAYER + "attention.attn.k",
        "encoder/layer_{i}/attention/value": LAYER + "attention.attn.v",
        "encoder/layer_{i}/attention/output": LAYER + "attention.attn.o",
        "encoder/layer_{i}/attention_norm": LAYER + "attention.LayerNorm",
        "encoder/layer_{i}/mlp/up": LAYER + "intermediate.dense",
        "encoder/layer_{i}/mlp/down": LAYER + "output.dense",
        "encoder/layer_{i}/mlp_norm": LAYER + "output.LayerNorm",
        "pooler": "classifier.dense",
        "classifier": "classifier.out_proj",
    },
    prefix="mpnet.",
    unused=(r"pooler\.dense\.", r"lm_head\."),
    head=("classifier", "pooler"),
)
DISTILLED = "transformer.layer.{i}."

BERT = text_family(
    read_config,
    SHARED | {"pooler": "pooler.dense", "classifier": "classifier"},
    prefix="bert.",
    unused=(r"pooler\.dense\.", r"cls\."),
    head=("classifier",),
)
ROBERTA = text_family(  # and XLM-RoBERTa, of the same names
    read_roberta,
    SHARED | {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    prefix="roberta.",
    unused=(r"pooler\.dense\.", r"lm_head\."),
    head=("classifier", "pooler"),
)
DISTILBERT = text_family(
    read_distilbert,
    {
        "encoder/layer_{i}/attention/query": DISTILLED + "attention.q_lin",
        "encoder/layer_{i}/attention/key": DISTILLED + "attention.k_lin",
        "encoder/layer_{i}/attention/value": DISTILLED + "attention.v_lin",
        "encoder/layer_{i}/attention/output": DISTILLED + "attention.out_lin",
        "encoder/layer_{i}/attention_norm": DISTILLED + "sa_layer_norm",
        "encoder/layer_{i}/mlp/up": DISTILLED + "ffn.lin1",
        "encoder/layer_{i}/mlp/down": DISTILLED + "ffn.lin2",
        "encoder/layer_{i}/mlp_norm": DISTILLED + "output_layer_norm",
        "pooler": "pre_classifier",
        "classifier": "classifier",
    },
    prefix="distilbert.",
    unused=(r"pre_classifier\.", r"vocab_(transform|layer_norm|projector)\."),
    head=("classifier", "pooler"),
)
