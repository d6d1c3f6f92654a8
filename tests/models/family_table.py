"""The table of model families: what each can do here, from the registry and the tests.

``python -m tests.models.family_table`` writes it to `lora_jax/models/families`;
`test_family_table.py` fails where it says more or less than is tested.
"""

import functools
import json
from pathlib import Path

from lora_jax.files.gguf_names import ARCHITECTURES
from lora_jax.models.families import FAMILIES
from tests.interop.peft_cases import CASES
from tests.models.golden import GOLDEN

FILE = Path(__file__).parents[2] / "lora_jax" / "models" / "families" / "README.md"
TOWER = "the language model"
MODELS = {  # what goes by a model_type
    "bert": "BERT, all-MiniLM, BGE",
    "clip": "CLIP, both encoders",
    "clip_text_model": "CLIP's text encoder, with its projection or without",
    "clip_vision_model": "CLIP's image encoder, with its projection or without",
    "cohere2": "Command R7B, Command A",
    "deberta-v2": "DeBERTa v2 and v3",
    "dinov2": "DINOv2",
    "electra": "ELECTRA",
    "gemma2": "Gemma 2",
    "gemma3": f"Gemma 3 4B, 12B, 27B; {TOWER}",
    "distilbert": "DistilBERT",
    "gemma3_text": "Gemma 3 270M, 1B; EmbeddingGemma",
    "gemma4": f"Gemma 4 E2B, E4B, 26B-A4B, 31B; {TOWER}",
    "gemma4_text": "the same alone",
    "glm4": "GLM-4 0414",
    "gpt2": "GPT-2",
    "gpt_oss": "gpt-oss-20b, 120b",
    "granite": "Granite 3",
    "lfm2": "LFM2",
    "llama": "Llama 2, 3 and 3.x; SmolLM2",
    "ministral3": "Ministral 3, without its vision",
    "mistral": "Mistral 7B, Nemo",
    "mistral3": f"Mistral Small 3.1 and 3.2, Ministral 3; {TOWER}",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "modernbert": "ModernBERT",
    "mpnet": "all-mpnet-base-v2",
    "mt5": "mT5",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "phi3": "Phi-3, Phi-4, Phi-4-mini",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_5_vl": f"Qwen2.5-VL; {TOWER}",
    "qwen3": "Qwen3, Qwen3-Embedding",
    "qwen3_5": f"Qwen3.5 and 3.6, dense; {TOWER}",
    "qwen3_5_moe": f"Qwen3.5 and 3.6 with experts (35B-A3B, 122B-A10B, ...); {TOWER}",
    "qwen3_5_moe_text": "the same alone",
    "qwen3_5_text": "the same alone",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_vl": f"Qwen3-VL; {TOWER}",
    "roberta": "RoBERTa",
    "siglip": "SigLIP, SigLIP 2 of a fixed size; both encoders",
    "siglip_text_model": "SigLIP's text encoder",
    "siglip_vision_model": "SigLIP's image encoder",
    "smollm3": "SmolLM3",
    "t5": "T5, T5 1.1, Flan-T5; encoder–decoder, or the encoder alone",
    "umt5": "UMT5",
    "vit": "ViT",
    "xlm-roberta": "XLM-RoBERTa, multilingual E5",
}
COLUMNS = ("loads", "trains", "generates", "PEFT in", "PEFT out", "GGUF in")
INTRO = """# Model families

By the `model_type` of `config.json`. *Loads*: logits as transformers computes them,
within 2e-4. *Trains*: adapters of all linear layers get gradients. *Generates*: with a
cache; an encoder–decoder answers the prompt. *PEFT in, out*: adapters that PEFT wrote
compute what it computes with them, and come back as they were. *GGUF in*: llama.cpp's
files of these models.

Of a multimodal folder the language model is read: text in, text out. Its vision and
audio tensors stay on disk, and `lora-jax merge` writes them again. Adapters have the
names that PEFT and vLLM expect there (`model.language_model.layers...`), and fit the
language model's own folder as well.

Of a folder of sentence-transformers (`modules.json`), `lora-jax encode` follows the
pooling, the dense layers and the normalisation, and `--prompt` takes a prompt of it; so
do `apply(variables, ids, mask, method="encode")` of a decoder and `"embed"` of an
encoder. Of CLIP and SigLIP it encodes lines of texts (`"embed"`) or of images
(`"embed_image"`). `lora-jax train` adapts the models of texts on lines of `anchor` and
`positive`, maybe `negative`; `lora_jax.embedding_loss` also images with texts.

"""


@functools.cache
def golden_folders() -> dict[str, list[str]]:
    """Returns the golden models of each family."""
    found: dict[str, list[str]] = {}
    for file in sorted(GOLDEN.glob("*/config.json")):
        kind = json.loads(file.read_text()).get("model_type")
        found.setdefault(kind, []).append(file.parent.name)
    return found


def cells(kind: str) -> list[bool]:
    """Says what a family can do, in the order of `COLUMNS`.

    Args:
      kind: its ``model_type``.

    Returns:
      One value a column. What a golden folder is there for, tests of all such folders
      hold; that every family with one trains, and every decoder generates, is in
      `test_family_table.py`.
    """
    folders = golden_folders().get(kind, [])
    has_logits = any(list((GOLDEN / f).glob("*reference.npz")) for f in folders)
    has_adapters = any(folder in folders for folder, _ in CASES)
    is_decoder = not FAMILIES[kind].head
    return [
        has_logits,
        has_logits,
        has_logits and is_decoder,
        has_adapters,
        has_adapters,
        kind in {a.model_type for a in ARCHITECTURES.values()},
    ]


def text() -> str:
    """Returns the file."""
    heads = ("model_type", "models", *COLUMNS)
    lines = [heads, ("---",) * len(heads)]
    for kind in sorted(FAMILIES):
        marks = ["yes" if cell else "–" for cell in cells(kind)]
        lines.append((f"`{kind}`", MODELS.get(kind, ""), *marks))
    return INTRO + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    FILE.write_text(text())
