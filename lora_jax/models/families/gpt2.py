"""GPT-2: LayerNorm, learned positions, one kernel for query, key and value.

Its ``Conv1D`` kernels are stored ``[in, out]``, as in Flax.
"""

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families.llama import Sizes, decoder_family
from lora_jax.models.fields import Fields, config_reader


@config_reader(DecoderConfig, "GPT-2 decoder")
def read_gpt2(fields: Fields) -> Sizes:
    """Reads a GPT-2 config; absent keys have transformers' defaults."""
    fields.only("scale_attn_weights", True)
    fields.only("add_cross_attention", False)
    hidden, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    if heads < 1 or hidden % heads:
        fields.faults.append(f"n_head must divide n_embd = {hidden}; got {heads}")
        heads = 1
    return {
        "vocab_size": fields.integer("vocab_size", 50257),
        "hidden_size": hidden,
        "num_layers": fields.layers("n_layer", 12),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "mlp_size": fields.integer("n_inner", 4 * hidden),
        "max_positions": fields.integer("n_positions", 1024),
        "activation": fields.text("activation_function", "gelu_new"),
        "is_gated": False,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "has_qkv_bias": True,
        "has_output_bias": True,
        "has_mlp_bias": True,
        "is_qkv_fused": True,
        "has_learned_positions": True,
        "divides_by_layer": fields.flag("scale_attn_by_inverse_layer_idx"),
        "is_tied": fields.flag("tie_word_embeddings", True),
    }


GPT2 = decoder_family(
    read_gpt2,
    {
        "embed": "wte",
        "positions": "wpe",
        "layer_{i}/attention_norm": "h.{i}.ln_1",
        "layer_{i}/attention/qkv": "h.{i}.attn.c_attn",
        "layer_{i}/attention/output": "h.{i}.attn.c_proj",
        "layer_{i}/mlp_norm": "h.{i}.ln_2",
        "layer_{i}/mlp/up": "h.{i}.mlp.c_fc",
        "layer_{i}/mlp/down": "h.{i}.mlp.c_proj",
        "final_norm": "ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    unused=(r"h\.\d+\.attn\.(masked_)?bias$",),
    is_transposed=False,
)
