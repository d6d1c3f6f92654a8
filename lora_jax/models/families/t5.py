"""T5, Flan-T5, mT5, UMT5: encoder–decoders with relative positions.

transformers 5 ties head and embedding unless the file holds a head of its own, as
T5 1.1's and Flan-T5's do; a config's ``tie_word_embeddings`` only says, for T5 and
UMT5, whether the decoder's last hidden states are scaled by ``d ** -0.5``.
"""

from typing import Any

from lora_jax.models.encoder_decoder import EncoderDecoder
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.family import Family, architecture, token_inputs
from lora_jax.models.fields import Fields, config_reader

Arguments = dict[str, Any]


def _read(fields: Fields) -> Arguments:
    layers = fields.layers("num_layers")
    width = fields.integer("d_model")
    kind = fields.text("feed_forward_proj")
    gated, _, activation = kind.rpartition("-")
    if gated not in ("", "gated"):
        fields.faults.append(
            "feed_forward_proj must be an activation's name or 'gated-' and one; "
            f"got {kind!r}"
        )
    is_scaled = fields.flag("tie_word_embeddings", True)  # of old configs
    is_scaled = fields.flag("scale_decoder_outputs", is_scaled)
    is_bare = architecture(fields.config).endswith("EncoderModel")
    decoders = fields.layers("num_decoder_layers", layers)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": width,
        "num_layers": layers,
        "num_decoder_layers": 0 if is_bare else decoders,
        "num_heads": fields.integer("num_heads"),
        "head_dim": fields.integer("d_kv"),
        "mlp_size": fields.integer("d_ff"),
        "activation": "gelu_new" if kind == "gated-gelu" else activation,
        "is_gated": gated == "gated",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-6),
        "num_buckets": fields.integer("relative_attention_num_buckets", 32),
        "max_distance": fields.integer("relative_attention_max_distance", 128),
        "logit_scale": max(width, 1) ** -0.5 if is_scaled else 1.0,
        "start_id": fields.integer(
            "decoder_start_token_id", fields.integer("pad_token_id", 0)
        ),
    }


@config_reader(EncoderDecoderConfig, "T5 encoder–decoder", feed_forward_proj="relu")
def read_t5(fields: Fields) -> Arguments:
    """Reads a T5 config (1.0, 1.1, Flan-T5)."""
    return _read(fields)


@config_reader(
    EncoderDecoderConfig, "mT5 encoder–decoder", feed_forward_proj="gated-gelu"
)
def read_mt5(fields: Fields) -> Arguments:
    """Reads an mT5 config: hidden states are never scaled."""
    return _read(fields) | {"logit_scale": 1.0}


@config_reader(
    EncoderDecoderConfig, "UMT5 encoder–decoder", feed_forward_proj="gated-gelu"
)
def read_umt5(fields: Fields) -> Arguments:
    """Reads a UMT5 config: every layer has its own relative position biases."""
    return _read(fields) | {"has_layer_biases": True}


def t5_family(read_config: Any) -> Family:
    """Makes a family of `EncoderDecoder`."""
    modules = {"embed": "shared", "head": "lm_head"}
    for side, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}/layer_{{i}}", f"{side}.block.{{i}}.layer"
        attention = f"{theirs}.0.SelfAttention"
        modules |= _projections(f"{ours}/attention", attention) | {
            f"{ours}/attention/relative_bias": f"{attention}.relative_attention_bias",
            f"{ours}/attention_norm": f"{theirs}.0.layer_norm",
            f"{ours}/mlp/up": f"{theirs}.{last}.DenseReluDense.wi",
            f"{ours}/mlp/gate": f"{theirs}.{last}.DenseReluDense.wi_0",
            f"{ours}/mlp/gated_up": f"{theirs}.{last}.DenseReluDense.wi_1",
            f"{ours}/mlp/down": f"{theirs}.{last}.DenseReluDense.wo",
            f"{ours}/mlp_norm": f"{theirs}.{last}.layer_norm",
            f"{side}/final_norm": f"{side}.final_layer_norm",
        }
    ours, theirs = "decoder/layer_{i}/cross", "decoder.block.{i}.layer.1"
    modules |= _projections(f"{ours}_attention", f"{theirs}.EncDecAttention")
    modules[f"{ours}_norm"] = f"{theirs}.layer_norm"
    return Family(
        read_config=read_config,
        module=EncoderDecoder,
        inputs=lambda config: token_inputs(3 if config.predicts else 2),
        modules=modules,
        prefix="",
        has_source=True,
        copies={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention",),
    )


def _projections(ours: str, theirs: str) -> dict[str, str]:
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return {f"{ours}/{own}": f"{theirs}.{other}" for own, other in names.items()}


T5 = t5_family(read_t5)
MT5 = t5_family(read_mt5)
UMT5 = t5_family(read_umt5)
