"""Writes ``tests/golden/resized``: PEFT adapters of vocabularies with new tokens.

Run in an environment with torch, transformers 5 and PEFT, after ``make_models.py``::

    python -m tests.golden.make_resized

The base is a golden model with a tokenizer of whole words, to which two tokens are
added as transformers and PEFT have it: ``resize_token_embeddings``, then
``trainable_token_indices`` (``rows``: of an untied embedding and head; ``tied``) or
``modules_to_save`` (``saved``: of a tied table). In ``reference.npz`` the logits of the
saved folder on the resized base, in float64, and the ids that the saved tokenizer gives
to `TEXT`.
"""

import json
import pathlib
import shutil
import tempfile
import warnings

import numpy as np
import peft
import torch
import transformers

from tests.golden.make_models import HERE, logits_of, save_adapter, seed
from tests.tiny_decoder import make_decoder

Fast = transformers.PreTrainedTokenizerFast  # not the model type's own
TARGET = HERE / "resized"
NEW = ["<tool>", "</tool>"]
TEXT = "what is <tool> sky ? </tool> blue ."
CASES = {
    "rows": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [3, 43, 44], "lm_head": [43, 44]}},
    ),
    "tied": ("qwen2", {"trainable_token_indices": [43, 44]}),
    "saved": (
        "qwen2",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


def resized(home, size):
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(home, **options)
    model.resize_token_embeddings(size)
    return model


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(TARGET, ignore_errors=True)
    arrays = {}
    for kind, (name, options) in CASES.items():
        seed("resized", kind)
        with tempfile.TemporaryDirectory() as folder:
            home = make_decoder(pathlib.Path(folder) / name, name)
            file = str(home / "tokenizer.json")
            tokenizer = Fast(tokenizer_file=file, eos_token="</s>")
            tokenizer.add_tokens(NEW)
            size = len(tokenizer)
            config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **options}
            save_adapter(TARGET / kind, resized(home, size), name, config)
            tokenizer.save_pretrained(TARGET / kind)
            again = Fast.from_pretrained(TARGET / kind)
            ids = torch.tensor([again(TEXT)["input_ids"]])
            base = resized(home, len(again))
            loaded = peft.PeftModel.from_pretrained(base, TARGET / kind).eval()
            arrays[kind] = logits_of(loaded, {"input_ids": ids})
            arrays["ids"] = ids
    versions = {
        "script": "tests/golden/make_resized.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    arrays = {key: value.numpy() for key, value in arrays.items()}
    arrays["metadata"] = np.array(json.dumps(versions))
    np.savez_compressed(TARGET / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
