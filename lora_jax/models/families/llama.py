"""Llama and the families that differ from it by a few fields.

Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 (a Llama), SmolLM3, Phi-3 and OLMo 2.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.models.families.rope import read_rope, rotated_dim
from lora_jax.models.family import Family, token_inputs
from lora_jax.models.fields import Fields, config_reader

Sizes = dict[str, Any]  # arguments of `DecoderConfig`


def decoder_reader(
    what: str, *, mlp_keys: tuple[str, ...] = ("intermediate_size",), **defaults: Any
) -> Any:
    """Makes `Family.read_config` of a function that reads what differs from Llama.

    Args:
      what: the family.
      mlp_keys: of the width inside the MLP; the first that the file has.
      **defaults: what absent keys mean.

    Returns:
      A decorator of a function of `Fields` and the arguments of `DecoderConfig` that
      all have, which returns further ones. Without ``ropes`` among them, all of every
      head is rotated.
    """

    def decorate(differences: Callable[[Fields, dict[str, Any]], Any]) -> Any:
        @config_reader(DecoderConfig, f"{what} decoder", **defaults)
        @functools.wraps(differences)
        def read(fields: Fields) -> dict[str, Any]:
            sizes = _read_sizes(fields, mlp_keys)
            found = sizes | differences(fields, sizes)
            return found if "ropes" in found else found | one_rope(fields, found)

        return read

    return decorate


def _read_sizes(fields: Fields, mlp_keys: tuple[str, ...]) -> dict[str, Any]:
    """Reads the `DecoderConfig` arguments that all Llama-like decoders share."""
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    own = (key for key in mlp_keys[:-1] if fields.config.get(key))
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", hidden // max(heads, 1)),
        "mlp_size": fields.integer(next(own, mlp_keys[-1])),
        "max_positions": fields.integer("max_position_embeddings", 2048),
        "activation": fields.text("hidden_act", "silu"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "is_tied": fields.flag("tie_word_embeddings"),
    }


def attention_biases(fields: Fields) -> dict[str, Any]:
    """Reads whether all four projections of attention have biases."""
    bias = fields.flag("attention_bias")
    return {"has_qkv_bias": bias, "has_output_bias": bias}


def full_layers(
    fields: Fields, layers: int, other: str, is_full: Callable[[int], bool]
) -> list[bool]:
    """Returns which layers have full attention, ``other`` being the other kind.

    ``layer_types`` says so, or else ``is_full`` of a layer's number.
    """
    kinds, known = fields.sequence("layer_types", layers), ("full_attention", other)
    if kinds is None:
        return [is_full(i) for i in range(layers)]
    if wrong := sorted({str(kind) for kind in kinds if kind not in known}):
        fields.faults.append(f"layer_types must be of {known}; got {wrong}")
    return [kind == known[0] for kind in kinds]


def sliding_layers(
    fields: Fields,
    layers: int,
    is_full: Callable[[int], bool],
    window: int | None,
) -> tuple[int | None, ...]:
    """Returns each layer's window, None with full attention; see `full_layers`."""
    found = full_layers(fields, layers, "sliding_attention", is_full)
    return tuple(None if full else window for full in found)


def every(period: int) -> Callable[[int], bool]:
    """Returns whether a layer is the last of a period."""
    return lambda i: (i + 1) % period == 0


def window_or_none(fields: Fields) -> int | None:
    """Reads the window of families in which ``null`` means none."""
    is_none = fields.is_null("sliding_window")
    return None if is_none else fields.integer("sliding_window", None)


def window_if_used(fields: Fields) -> int | None:
    """Reads the window of families that have a flag for it."""
    is_used = fields.flag("use_sliding_window")
    return fields.integer("sliding_window", 4096) if is_used else None


def one_rope(
    fields: Fields, sizes: Mapping[str, Any], rotary_dim: int | None = None
) -> dict[str, Any]:
    """Reads one table for all layers, of full rotation unless a dimension is given."""
    rope = read_rope(fields, sizes["head_dim"] if rotary_dim is None else rotary_dim)
    return {"ropes": (rope,), "layer_ropes": (0,) * sizes["num_layers"]}


def two_ropes(
    ropes: tuple[Rope, Rope], windows: tuple[int | None, ...]
) -> dict[str, Any]:
    """Gives layers without a window the first table, those with one the second."""
    return {
        "ropes": ropes,
        "layer_ropes": tuple(0 if window is None else 1 for window in windows),
        "layer_windows": windows,
    }


@decoder_reader("Llama")
def read_llama(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Llama config (SmolLM2's too)."""
    del sizes
    return attention_biases(fields) | {"has_mlp_bias": fields.flag("mlp_bias")}


@decoder_reader(
    "Mistral",
    max_position_embeddings=131072,
    num_key_value_heads=8,
    sliding_window=4096,
)
def read_mistral(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Mistral config: every layer has the sliding window."""
    return {"layer_windows": (window_or_none(fields),) * sizes["num_layers"]}


def _qwen_windows(fields: Fields, sizes: Sizes) -> tuple[int | None, ...]:
    window = window_if_used(fields)
    first = fields.integer("max_window_layers", 28)
    return sliding_layers(fields, sizes["num_layers"], lambda i: i < first, window)


@decoder_reader("Qwen2", max_position_embeddings=32768)
def read_qwen2(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Qwen2 or Qwen2.5 config: biases on query, key and value."""
    return {"has_qkv_bias": True, "layer_windows": _qwen_windows(fields, sizes)}


@decoder_reader("Qwen3", max_position_embeddings=32768, head_dim=128)
def read_qwen3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Qwen3 config: queries and keys are normalised per head."""
    return attention_biases(fields) | {
        "qk_norm": "head",
        "layer_windows": _qwen_windows(fields, sizes),
    }


@decoder_reader(
    "SmolLM3", max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=2e6
)
def read_smollm3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a SmolLM3 config: some layers have no rotary positions."""
    layers = sizes["num_layers"]
    interval = max(fields.integer("no_rope_layer_interval", 4), 1)
    rotates = fields.sequence("no_rope_layers", layers)
    if rotates is None:
        rotates = [not every(interval)(i) for i in range(layers)]
    window = window_if_used(fields)
    return {
        **attention_biases(fields),
        **one_rope(fields, sizes),
        "layer_ropes": tuple(0 if rotated else None for rotated in rotates),
        "layer_windows": sliding_layers(fields, layers, rotates.__getitem__, window),
        "has_mlp_bias": fields.flag("mlp_bias"),
    }


@decoder_reader("Phi-3", max_position_embeddings=4096, rms_norm_eps=1e-5)
def read_phi3(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads a Phi-3 config: fused projections, partial rotation of each head."""
    rotary_dim = rotated_dim(fields, sizes["head_dim"], 1.0)
    window = fields.integer("sliding_window", None)
    return one_rope(fields, sizes, rotary_dim) | {
        "layer_windows": (window,) * sizes["num_layers"],
        "is_qkv_fused": True,
        "is_gate_up_fused": True,
    }


@decoder_reader("OLMo 2", rms_norm_eps=1e-5)
def read_olmo2(fields: Fields, sizes: Sizes) -> Sizes:
    """Reads an OLMo 2 config: post-norms, and normalised queries and keys."""
    del sizes
    return attention_biases(fields) | {
        "qk_norm": "projection",
        "norm_placement": "post",
    }


def decoder_family(
    read_config: Any,
    modules: Mapping[str, str],
    *,
    prefix: str = "model.",
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",),
    **options: Any,
) -> Family:
    """Makes a family of `Decoder`; the arguments are `Family`'s."""
    return Family(
        read_config=read_config,
        module=Decoder,
        inputs=lambda _: token_inputs(1),
        modules=modules,
        prefix=prefix,
        prefixes=("model.language_model.", "language_model.model."),  # of a tower
        unused=(r"lm_head\.", *unused),  # a stray copy, where the head is tied
        **options,
    )


LAYER = "layers.{i}."
SHARED = {
    "embed": "embed_tokens",
    "layer_{i}/attention/query": LAYER + "self_attn.q_proj",
    "layer_{i}/attention/key": LAYER + "self_attn.k_proj",
    "layer_{i}/attention/value": LAYER + "self_attn.v_proj",
    "layer_{i}/attention/output": LAYER + "self_attn.o_proj",
    "layer_{i}/attention/query_norm": LAYER + "self_attn.q_norm",
    "layer_{i}/attention/key_norm": LAYER + "self_attn.k_norm",
    "layer_{i}/mlp/gate": LAYER + "mlp.gate_proj",
    "layer_{i}/mlp/up": LAYER + "mlp.up_proj",
    "layer_{i}/mlp/down": LAYER + "mlp.down_proj",
    "final_norm": "norm",
    "head": "lm_head",
}
PRE_NORMS = {
    "layer_{i}/attention_norm": LAYER + "input_layernorm",
    "layer_{i}/mlp_norm": LAYER + "post_attention_layernorm",
}
FUSED = {
    "layer_{i}/attention/qkv": LAYER + "self_attn.qkv_proj",
    "layer_{i}/mlp/gate_up": LAYER + "mlp.gate_up_proj",
}
POST_NORMS = {
    "layer_{i}/attention_post_norm": LAYER + "post_attention_layernorm",
    "layer_{i}/mlp_post_norm": LAYER + "post_feedforward_layernorm",
}

LLAMA = decoder_family(read_llama, SHARED | PRE_NORMS)
MISTRAL = decoder_family(read_mistral, SHARED | PRE_NORMS)
QWEN2 = decoder_family(read_qwen2, SHARED | PRE_NORMS)
QWEN3 = decoder_family(read_qwen3, SHARED | PRE_NORMS)
SMOLLM3 = decoder_family(read_smollm3, SHARED | PRE_NORMS)
PHI3 = decoder_family(read_phi3, SHARED | PRE_NORMS | FUSED)
OLMO2 = decoder_family(read_olmo2, SHARED | POST_NORMS)
