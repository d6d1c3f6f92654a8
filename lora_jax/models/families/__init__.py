"""Model families: which config keys mean what, and which tensor is which leaf."""

from lora_jax.models.families import bert, gemma, gpt2, llama, towers, vision
from lora_jax.models.family import Family

FAMILIES: dict[str, Family] = {  # by the model_type of config.json
    "bert": bert.BERT,
    "dinov2": vision.DINOV2,
    "distilbert": bert.DISTILBERT,
    "gemma2": gemma.GEMMA2,
    "gemma3": towers.GEMMA3_TOWER,
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt2.GPT2,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "mistral3": towers.MISTRAL3_TOWER,
    "olmo2": llama.OLMO2,
    "phi3": llama.PHI3,
    "qwen2": llama.QWEN2,
    "qwen2_5_vl": towers.QWEN2_VL_TOWER,
    "qwen3": llama.QWEN3,
    "qwen3_vl": towers.QWEN3_VL_TOWER,
    "roberta": bert.ROBERTA,
    "smollm3": llama.SMOLLM3,
    "vit": vision.VIT,
}
