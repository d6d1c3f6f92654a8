"""Model families: which config keys mean what, and which tensor is which leaf."""

from lora_jax.models.families import (
    bert,
    dense,
    gemma,
    gpt2,
    llama,
    mixtures,
    towers,
    vision,
)
from lora_jax.models.family import Family

FAMILIES: dict[str, Family] = {  # by the model_type of config.json
    "bert": bert.BERT,
    "cohere2": dense.COHERE2,
    "dinov2": vision.DINOV2,
    "distilbert": bert.DISTILBERT,
    "gemma2": gemma.GEMMA2,
    "gemma3": towers.GEMMA3_TOWER,
    "gemma3_text": gemma.GEMMA3,
    "glm4": dense.GLM4,
    "gpt2": gpt2.GPT2,
    "granite": dense.GRANITE,
    "llama": llama.LLAMA,
    "ministral3": dense.MINISTRAL3,
    "mistral": llama.MISTRAL,
    "mistral3": towers.MISTRAL3_TOWER,
    "mixtral": mixtures.MIXTRAL,
    "olmo2": llama.OLMO2,
    "olmoe": mixtures.OLMOE,
    "olmo3": dense.OLMO3,
    "phi3": llama.PHI3,
    "qwen2": llama.QWEN2,
    "qwen2_5_vl": towers.QWEN2_VL_TOWER,
    "qwen3": llama.QWEN3,
    "qwen3_moe": mixtures.QWEN3_MOE,
    "qwen3_vl": towers.QWEN3_VL_TOWER,
    "roberta": bert.ROBERTA,
    "smollm3": llama.SMOLLM3,
    "vit": vision.VIT,
    "xlm-roberta": bert.ROBERTA,
}
