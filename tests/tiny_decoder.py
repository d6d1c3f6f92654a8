"""A decoder that fits in a test: a golden one with a tokenizer of whole words."""

import json
import shutil
from pathlib import Path

import tokenizers

from tests.models.golden import GOLDEN

WORDS = [
    *("[UNK]", "</s>", "<s>", "user", "assistant", ".", "?", "red", "green", "blue"),
    *("is", "the", "sky", "grass", "sea", "what"),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_decoder(folder: Path, golden: str = "llama") -> Path:
    """Writes the model folder, chat template included; Llama by default."""
    others = shutil.ignore_patterns("peft_*", "*.npz")
    shutil.copytree(GOLDEN / golden, folder, ignore=others)
    words = WORDS + [f"w{i}" for i in range(43 - len(WORDS))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
