"""Writes ``tests/golden/{t5,flan-t5,...}``: tiny encoder–decoders, and PEFT's on them.

Run in an environment with torch, transformers 5 and PEFT (not needed by the tests)::

    python -m tests.golden.make_t5

The folders are as those of ``make_models.py``. `reference.npz` holds the inputs (one
source padded on the right, one on the left), the logits, the encoder's and the
decoder's last hidden states, the loss of `labels`, and for each adapter its logits;
also sources and what `generate` answers. The folder ``t5`` has a tokenizer of T5's
kind, and `tokens.json` what it makes of texts.
"""

import copy
import json
import pathlib
import shutil
import sys
import warnings

import peft
import torch
import transformers

from tests.golden.make_models import (
    HERE,
    check_shows,
    randomise,
    save_adapter,
    seed,
    versions,
    write,
)

SIZES = {
    "vocab_size": 43,
    "d_model": 10,
    "d_kv": 3,
    "d_ff": 14,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 7,
    "layer_norm_epsilon": 0.02,
    "decoder_start_token_id": 0,
}
# The class, its config, and whether the head is a tensor of its own.
MODELS = {
    "t5": ("T5", {"feed_forward_proj": "relu"}, False),
    "t5_flan": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        True,
    ),
    "mt5": (
        "MT5",
        {"feed_forward_proj": "gated-silu", "decoder_start_token_id": 5},
        True,
    ),
    "umt5": (
        "UMT5",
        {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2},
        False,
    ),
}
TOGGLES = (
    {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 30},
    {"layer_norm_epsilon": 1e-6},
)
SHARED = {"task_type": "SEQ_2_SEQ_LM"}
ADAPTERS = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **SHARED},
    "rslora": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q", "v", "wo"],
        "rank_pattern": {"EncDecAttention.q": 4, "wo": 1},
        "alpha_pattern": {"decoder.*.v": 7},
        **SHARED,
    },
}
DORA = {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["q", "o"]}
SAVED = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["k"],
    "modules_to_save": ["lm_head"],
}
EXTRA = {"t5_flan": {"dora": DORA | SHARED, "saved": SAVED | SHARED}}

# T5's order: padding, end, unknown, pieces, and sentinels from the last to the first.
WORDS = ("what", "is", "the", "sky", "grass", "sea", "blue", "green", "red", "answer")
PIECES = (
    *(("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)),
    *((f"▁{word}", -4.0 - 0.1 * i) for i, word in enumerate(WORDS)),
    *(
        (piece, -6.0)
        for piece in ("ly", "s", "en", "gr", "bl", "re", "ue", "?", ".", ":")
    ),
    *((letter, -8.0 - 0.01 * i) for i, letter in enumerate("abcdeghklnorstuwy")),
    *(("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)),
)
TEXTS = (
    "what is the sky?",
    "  the   grass is greenly :  blue .",
    "answers: <extra_id_0> sea <extra_id_1>",
    "Zürich reds",
    "",
)


def write_tokenizer(home: pathlib.Path):
    """Writes T5's kind of tokenizer, and what it makes of some texts."""
    if len(PIECES) != SIZES["vocab_size"]:
        raise AssertionError(len(PIECES))
    own = transformers.T5Tokenizer(vocab=list(PIECES), extra_ids=2)
    own.save_pretrained(home)
    again = transformers.AutoTokenizer.from_pretrained(home)
    ids = again(list(TEXTS))["input_ids"]
    decoded = again.batch_decode(ids, skip_special_tokens=True)
    tokens = {"texts": TEXTS, "ids": ids, "decoded": decoded}
    (home / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False) + "\n")


def make_batch(name: str) -> dict[str, torch.Tensor]:
    seed(name, "inputs")
    ids, mask = torch.randint(3, 43, (3, 17)), torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0  # padding on the right,
    mask[2, :6] = 0  # and on the left
    ids[mask == 0] = 0
    labels = torch.randint(3, 43, (3, 11))
    labels[1, 7:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def start(model, labels: torch.Tensor) -> torch.Tensor:
    return model.prepare_decoder_input_ids_from_labels(labels)


@torch.no_grad()
def outputs(model, batch) -> dict[str, torch.Tensor]:
    """Computed in float64, rounded to float32."""
    found = copy.deepcopy(model).double()(**batch, output_hidden_states=True)
    logits = found.logits.float()
    if not 0.5 < logits.abs().max() < 60:
        raise AssertionError(f"logits up to {logits.abs().max()}")
    return {
        "logits": logits,
        "loss": found.loss.float(),
        "encoder_hidden": found.encoder_last_hidden_state.float(),
        "decoder_hidden": found.decoder_hidden_states[-1].float(),
    }


@torch.no_grad()
def check_sensitive(model, config: dict, batch, logits: torch.Tensor):
    """Every parameter and every toggled key shows in the logits."""
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        check_shows(name, logits, model(**batch).logits)
        parameter.copy_(kept)
    for toggle in TOGGLES:
        other = type(model)(type(model.config)(**config | toggle)).eval()
        other.load_state_dict(model.state_dict())
        check_shows(str(toggle), logits, other(**batch).logits)


@torch.no_grad()
def greedy(model, name: str) -> dict[str, torch.Tensor]:
    """Two sources and the 8 tokens that `generate` answers: varied, no near ties."""
    seed(name, "prompts")
    model.generation_config.eos_token_id = None
    arrays = {}
    for _ in range(2000):
        i, length = len(arrays) // 2, (4, 7)[len(arrays) // 2]
        source = torch.randint(3, 43, (1, length))
        tokens = model.generate(  # whose cache has as many layers as the encoder
            source, do_sample=False, max_new_tokens=8, use_cache=False
        )
        top = model(input_ids=source, decoder_input_ids=tokens).logits[0, :-1]
        top = top.topk(2).values
        new = tokens[0, 1:]
        if len(new.unique()) >= 3 and (top[:, 0] - top[:, 1]).min() > 1e-2:
            arrays |= {f"prompt_{i}": source[0], f"greedy_{i}": new}
        if len(arrays) == 4:
            return arrays
    raise AssertionError(f"{name}: no varied greedy decoding")


def make(name: str):
    kind, changes, has_head = MODELS[name]
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    config, home = {**SIZES, **changes}, HERE / name
    seed(name, "weights")
    shutil.rmtree(home, ignore_errors=True)
    model = cls(cls.config_class(**config)).eval()
    randomise(model)
    if has_head:
        model.lm_head.weight = torch.nn.Parameter(0.4 * torch.randn(43, 10))
    batch = make_batch(name)
    arrays = {**batch, "decoder_input_ids": start(model, batch["labels"])}
    arrays |= outputs(model, batch)
    check_sensitive(model, config, batch, arrays["logits"])
    model.save_pretrained(home)
    (home / "generation_config.json").unlink(missing_ok=True)
    loaded = cls.from_pretrained(home).eval()
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch))
    arrays |= greedy(loaded, name)
    for adapter, settings in (ADAPTERS | EXTRA.get(name, {})).items():
        seed(name, adapter)
        folder = home / f"peft_{adapter}"
        tuned = save_adapter(folder, cls.from_pretrained(home), name, settings)
        again = peft.PeftModel.from_pretrained(cls.from_pretrained(home), folder).eval()
        logits = outputs(again, batch)["logits"]
        torch.testing.assert_close(logits, outputs(tuned.eval(), batch)["logits"])
        check_shows(f"{name} {adapter}", arrays["logits"], logits)
        arrays[f"logits_{adapter}"] = logits
    if name == "t5":
        write_tokenizer(home)
    write(home / "reference.npz", arrays)


def main(names: list[str]):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in names or MODELS:
        make(name)
    found = versions("tests/golden/make_t5.py")
    (HERE / "t5_versions.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
