"""Writes ``tests/golden/peft_options``: PEFT's less common options, and their logits.

Run in an environment with torch, transformers 5 and PEFT, after ``make_models.py``::

    python -m tests.golden.make_peft_options

One folder an adapter, as PEFT saves it, on the golden model that its config names; in
``reference.npz`` what PEFT computes from the saved files, in float64, for the inputs of
that model's own ``reference.npz``. ``qwen2`` and ``gpt2`` have tied heads.
"""

import json
import shutil
import tempfile
import warnings

import numpy as np
import peft
import torch
import transformers

from tests.golden.make_exports import inputs, make_base
from tests.golden.make_models import HERE, logits_of, save_adapter, seed

TARGET = HERE / "peft_options"
TOKENS = [3, 7, 12]
CASES = {  # name: the golden model, and arguments of `peft.LoraConfig`
    "embed": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("qwen2", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}),
    "ensure": (
        "qwen2",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "saved_embed": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved_head": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "saved_ensure": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "gpt2_head": (
        "gpt2",
        {"target_modules": ["lm_head", "c_attn"], "fan_in_fan_out": True},
    ),
    "tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    ),
    "tokens_tied": (
        "qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    ),
    "tokens_named": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"lm_head": TOKENS, "embed_tokens": [1]},
        },
    ),
    "lora_bias": (
        "gpt2",
        {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "saved_norm": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "modules_to_save": ["ln_f"],
            "bias": "all",
            "fan_in_fan_out": True,
        },
    ),
    "saved_any": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["model.norm", "post_attention_layernorm", "down_proj"],
        },
    ),
    "bare_bert": ("bert", {"target_modules": "all-linear"}),
}


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(TARGET, ignore_errors=True)
    arrays = {}
    for kind, (name, options) in CASES.items():
        seed("peft_options", kind)
        load = {"attn_implementation": "eager"}
        with tempfile.TemporaryDirectory() as folder:
            home, cls = HERE / name, transformers.AutoModelForCausalLM
            if name == "bert":
                home = make_base(name, "bare", TARGET.__class__(folder) / "base")
                cls = transformers.AutoModel
            config = {"r": 2, "lora_alpha": 3, **options}
            save_adapter(TARGET / kind, cls.from_pretrained(home, **load), name, config)
            model = cls.from_pretrained(home, **load)
        loaded = peft.PeftModel.from_pretrained(model, TARGET / kind).eval()
        batch = {key: torch.from_numpy(value) for key, value in inputs(name).items()}
        if name == "bert":
            with torch.no_grad():
                hidden = loaded.double()(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            arrays[kind] = ((hidden * mask).sum(1) / mask.sum(1)).float()
        else:
            arrays[kind] = logits_of(loaded, batch)
    versions = {
        "script": "tests/golden/make_peft_options.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    arrays = {key: value.numpy() for key, value in arrays.items()}
    arrays["metadata"] = np.array(json.dumps(versions))
    np.savez_compressed(TARGET / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
