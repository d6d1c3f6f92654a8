"""GGUF's architectures: their names of tensors, and Hugging Face's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.names import LM_HEAD

HEAD_TENSOR = f"{LM_HEAD}.weight"
EMBED_TENSOR = "model.embed_tokens.weight"
MIXTRAL = "llama with experts"  # llama.cpp calls both "llama"


class Architecture(NamedTuple):
    """How llama.cpp stores one architecture.

    Attributes:
      model_type: Hugging Face's model type.
      class_name: Hugging Face's causal language model class.
      blocks: from a tensor's name within a block to Hugging Face's.
      permuted: whether the rows of q and k are interleaved.
      shifted_norms: whether 1 was added to the norms.
      experts: from the name of a tensor of all experts to that of one, ``{e}``.
      has_normalized_scores: whether those of a token's experts sum to 1; in llama.cpp's
        code, not in the file.
    """

    model_type: str
    class_name: str
    blocks: Mapping[str, str]
    permuted: bool = False
    shifted_norms: bool = False
    experts: Mapping[str, str] = {}
    has_normalized_scores: bool = True


_TOP = {
    "token_embd.weight": EMBED_TENSOR,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD_TENSOR,
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BEFORE_MLP = {"ffn_norm": "post_attention_layernorm"}
_DENSE = _ATTENTION | _MLP | _BEFORE_MLP
_EXPERTS = {
    f"{key}_exps": name.replace("mlp", "mlp.experts.{e}") for key, name in _MLP.items()
}
_ROUTED = _ATTENTION | _BEFORE_MLP | {"ffn_gate_inp": "mlp.gate"}
_MIXTRAL = "block_sparse_moe"
_GEMMA = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_OLMO2 = {
    **{key: name for key, name in (_ATTENTION | _MLP).items() if key != "attn_norm"},
    **_HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4 = {
    **_DENSE,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
del _GLM4["ffn_gate"]
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _DENSE, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _DENSE),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _DENSE | _HEAD_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA, shifted_norms=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA | _HEAD_NORMS, shifted_norms=True
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2),  # and OLMo 3
    "granite": Architecture("granite", "GraniteForCausalLM", _DENSE, permuted=True),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", _GLM4),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", _ATTENTION | _MLP),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _ROUTED | _HEAD_NORMS, experts=_EXPERTS
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        _ROUTED | _HEAD_NORMS,
        experts=_EXPERTS,
        has_normalized_scores=False,
    ),
    MIXTRAL: Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _ROUTED | {"ffn_gate_inp": f"{_MIXTRAL}.gate"},
        permuted=True,
        experts={
            "ffn_gate_exps": f"{_MIXTRAL}.experts.{{e}}.w1",
            "ffn_up_exps": f"{_MIXTRAL}.experts.{{e}}.w3",
            "ffn_down_exps": f"{_MIXTRAL}.experts.{{e}}.w2",
        },
    ),
}


def architecture_of(path: Path, metadata: Mapping[str, Any]) -> str:
    """Returns a file's architecture; raises a ValueError if it is not supported."""
    found = metadata.get("general.architecture")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        got = repr(found)[:80]
        raise ValueError(
            f"{path}: general.architecture must be one of {sorted(ARCHITECTURES)}; got "
            f"{got}. Use the model's Hugging Face folder instead."
        )
    experts = metadata.get("llama.expert_count")
    is_mixture = found == "llama" and isinstance(experts, int) and experts > 0
    return MIXTRAL if is_mixture else found


def hugging_face_name(name: str, architecture: str) -> str | None:
    """Translates a tensor's GGUF name; None if the architecture has no such tensor.

    A tensor of all experts has ``{e}`` for the number of one.

    Example:
      >>> hugging_face_name("blk.3.attn_q.weight", "llama")
      'model.layers.3.self_attn.q_proj.weight'
    """
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    rule = ARCHITECTURES[architecture]
    known = {**rule.blocks, **rule.experts}
    if match is None or match[2] not in known:
        return None
    block = known[match[2]]
    return f"model.layers.{match[1]}.{block}.{match[3]}"
