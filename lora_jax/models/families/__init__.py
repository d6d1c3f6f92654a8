"""Model families: which config keys mean what, and which tensor is which leaf."""

from lora_jax.models.families import gemma, gpt2, llama
from lora_jax.models.families.bert import BERT
from lora_jax.models.family import Family

FAMILIES: dict[str, Family] = {  # by the model_type of config.json
    "bert": BERT,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt2.GPT2,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "olmo2": llama.OLMO2,
    "phi3": llama.PHI3,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "smollm3": llama.SMOLLM3,
}
