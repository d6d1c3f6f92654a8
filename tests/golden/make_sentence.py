"""Writes ``tests/golden/sentence``: tiny folders as sentence-transformers saves them.

Run in an environment with torch, transformers 5, PEFT and sentence-transformers (not
needed by the tests)::

    python -m tests.golden.make_sentence

Each folder has ``reference.npz``: texts, their token ids and embeddings, those with the
prompt "query", and those with the adapter in ``peft_plain``. ``poolings.npz`` has what
every mode of its Pooling makes of random hidden states. Everything is computed in
float64. ``versions.json`` names the versions.
"""

import json
import pathlib
import shutil
import warnings

import numpy as np
import peft
import sentence_transformers
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from tests.golden.make_models import randomise, seed, versions, write
from tests.golden.model_families import DECODER, GEMMA, GEMMA3_ROPE, rope, without

HOME = pathlib.Path(__file__).parent / "sentence"
TEXTS = ("w3 w4 w9", "w40 w5 w6 w7 w8 w12 w31 w3", "w17")
PROMPTS = {"query": "w20 w21 ", "document": "w22 "}
MODELS = {
    "qwen3_embedding": (
        "Qwen3Model",
        {**DECODER, "head_dim": 8, "rope_parameters": rope(100.0)},
        ("lasttoken",),
        (),
    ),
    "embeddinggemma": (
        "Gemma3TextModel",
        {
            **without(GEMMA, "final_logit_softcapping"),
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
            "sliding_window": 5,
            "rope_parameters": GEMMA3_ROPE,
            "use_bidirectional_attention": True,
        },
        ("mean",),
        ((27, torch.nn.Identity(), False), (15, torch.nn.Tanh(), True)),
    ),
}


def tokenizer(folder: pathlib.Path):
    """A tokenizer of words w3 to w42, which ends every text with its last token."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 43))]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    wrapped.save_pretrained(folder)


def make(name: str):
    kind, config, modes, denses = MODELS[name]
    home, start = HOME / name, HOME / f"{name}_start"
    for folder in (home, start):
        shutil.rmtree(folder, ignore_errors=True)
    cls = getattr(transformers, kind)
    seed(name, "model")
    model = cls(cls.config_class(attn_implementation="eager", **config))
    randomise(model)
    model.save_pretrained(start)
    tokenizer(start)
    base = Transformer(str(start), max_seq_length=9)
    width, steps = config["hidden_size"] * len(modes), []
    for out, activation, bias in denses:
        dense = Dense(width, out, bias=bias, activation_function=activation)
        torch.nn.init.normal_(dense.linear.weight, std=0.3)
        steps.append(dense)
        width = out
    pooling = Pooling(config["hidden_size"], pooling_mode=modes)
    whole = SentenceTransformer(
        modules=[base, pooling, *steps, Normalize()], prompts=PROMPTS, device="cpu"
    )
    whole.save(str(home), create_model_card=False)
    shutil.rmtree(start)
    for stray in home.glob("README.md"):
        stray.unlink()
    arrays = {"texts": np.array(TEXTS)}
    again = SentenceTransformer(str(home), device="cpu").double().eval()
    arrays["embeddings"] = again.encode(list(TEXTS))
    arrays["with_prompt"] = again.encode(list(TEXTS), prompt_name="query")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
    )
    seed(name, "plain")
    inner = cls.from_pretrained(home)
    tuned = peft.get_peft_model(inner, settings)
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter = home / "peft_plain"
    tuned.save_pretrained(adapter)
    (adapter / "README.md").unlink()
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    written["base_model_name_or_path"] = f"tests/golden/sentence/{name}"
    written["target_modules"].sort()
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    inner = cls.from_pretrained(home)
    again[0].model = peft.PeftModel.from_pretrained(inner, adapter).double().eval()
    arrays["with_adapter"] = again.encode(list(TEXTS))
    if np.abs(arrays["with_adapter"] - arrays["embeddings"]).max() < 1e-2:
        raise AssertionError("the adapter doesn't show")
    if not all(np.isfinite(arrays[key]).all() for key in arrays if key != "texts"):
        raise AssertionError(f"{name} is not finite")
    arrays = {k: v.astype("f4") if v.dtype == "f8" else v for k, v in arrays.items()}
    np.savez_compressed(home / "reference.npz", **arrays)


def make_poolings():
    seed("poolings")
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 0, 1, 1, 1, 0, 0]])
    arrays = {"hidden": hidden.float(), "mask": mask}
    for mode in Pooling.POOLING_MODES:
        features = {"token_embeddings": hidden, "attention_mask": mask}
        pooled = Pooling(5, pooling_mode=mode)(features)["sentence_embedding"]
        arrays[mode] = pooled.float()
    write(HOME / "poolings.npz", arrays)


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    HOME.mkdir(exist_ok=True)
    for name in MODELS:
        make(name)
    make_poolings()
    found = versions("tests/golden/make_sentence.py")
    found["sentence-transformers"] = sentence_transformers.__version__
    (HOME / "versions.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
