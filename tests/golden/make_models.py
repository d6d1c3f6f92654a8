"""Writes ``tests/golden/<family>``: tiny random models and what PEFT makes of them.

Run in an environment with torch, transformers 5 and PEFT (not needed by the tests)::

    python -m tests.golden.make_models            # all families
    python -m tests.golden.make_models llama vit  # these only

A folder holds the model as transformers saves it (`config.json`, `model.safetensors`),
one folder ``peft_<kind>`` per adapter as PEFT saves it, and `reference.npz`: the
inputs, the `logits` and, for each adapter, the `logits_<kind>` that PEFT computes from
the saved files, all computed in float64 and rounded to float32. Norms and biases are
far from 1 and 0. The script checks that the logits change when any parameter is left
out and when any config field of `Family.toggles` is ignored. The versions it ran with
are in ``versions.json``.
"""

import copy
import json
import pathlib
import platform
import re
import shutil
import sys
import warnings
import zlib

import numpy as np
import peft
import torch
import transformers

from tests.golden.dense_families import DENSE
from tests.golden.encoder_families import ENCODERS
from tests.golden.model_families import BERT, FAMILIES, Family
from tests.golden.tower_families import TOWERS

HERE = pathlib.Path(__file__).parent
ALL = FAMILIES | TOWERS | DENSE | ENCODERS
DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
LAYERS = r".*layers\.\d+\..*(_proj|fc\d)"  # of both encoders
TEXT_LINEARS = r".*language_model\..*{}_proj"
WITH_IMAGES = "with_images"  # an adapter of which a language model takes a part
SHOWS = 1e-2  # What leaving something out must change in the logits, at least.
TEXT_TOWERS = ("CLIPTextModelWithProjection", "SiglipTextModel")
HEAD = r"(.*\.)?(pre_)?classifier(\..*)?"


def adapters(name: str, family: Family) -> dict[str, dict]:
    """`LoraConfig` arguments by kind; heads of classifiers get no adapter."""
    query, value = family.attention
    decoder = family.model.endswith(DECODERS)
    shared = {"task_type": "CAUSAL_LM"} if decoder else {"exclude_modules": HEAD}
    if name == "gpt2":
        shared["fan_in_fan_out"] = True
    linears = {"target_modules": "all-linear", **shared}
    attention = [query, value]
    if name in TOWERS:
        linears["target_modules"] = TEXT_LINEARS.format(r"\w+")
        attention = TEXT_LINEARS.format("[qv]")
    if family.linears:
        linears["target_modules"] = family.linears
    if "vision_config" in family.config and name not in TOWERS:
        linears = {"target_modules": LAYERS}
    saved = {"task_type": "CAUSAL_LM" if decoder else "SEQ_CLS"}
    kinds = {
        "plain": {"r": 3, "lora_alpha": 5, **linears},
        "rslora": {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": [query, value, family.mlp],
            "rank_pattern": {query: 4, family.mlp.replace(".", r"\."): 1},
            "alpha_pattern": {value: 7, family.mlp.replace(".", r"\."): 2},
            "layers_to_transform": [1],
            **shared,
        },
        "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, **linears},
        "embed": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["embed_tokens", "lm_head"],
        },
        "saved": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": attention,
            "modules_to_save": ["lm_head" if decoder else "classifier"],
            **saved,
        },
        WITH_IMAGES: {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
        "conv": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["projection", query, value],
        },
    }
    return {kind: kinds[kind] for kind in (*family.kinds, *family.extra)}


def seed(*names: str):
    torch.manual_seed(zlib.crc32("/".join(names).encode()))


def neutral(model, name: str) -> float:
    """The value at which a parameter is as good as left out."""
    kind = model.config.model_type
    offset = re.match("gemma[23]?(_text)?$", kind)
    if re.match("qwen3_5", kind):
        offset = not name.endswith("linear_attn.norm.weight")
    norm = re.search(r"norm|ln_\w|lambda1", name.lower()) and name.endswith(
        ("weight", "lambda1")
    )
    return 1.0 if norm and not offset else 0.0


def randomise(model):
    for name, parameter in model.named_parameters():
        spread = 0.4 if parameter.ndim > 1 else 0.3
        middle = 2.0 if name == "logit_scale" else neutral(model, name)
        torch.nn.init.normal_(parameter, middle, spread)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's, in the file
            torch.nn.init.uniform_(buffer, 0.6, 1.4)


def build(family: Family, state=None, **changes):
    cls = getattr(transformers, family.model)
    config = cls.config_class(
        attn_implementation="eager", **copy.deepcopy({**family.config, **changes})
    )
    model = cls(config).eval()
    if state is None:
        randomise(model)
    else:
        model.load_state_dict(state)
    return model


def make_batch(name: str, family: Family) -> dict[str, torch.Tensor]:
    """Random inputs; encoder texts end in padding, and one has a stray pad token."""
    seed(name, "inputs")
    if "image_size" in family.config:
        size = family.config["image_size"]
        return {
            "pixel_values": torch.randn(3, family.config["num_channels"], size, size)
        }
    sizes = family.config.get("text_config", family.config)
    most = 40 if name in TOWERS else sizes["vocab_size"]  # no token of an image
    ids = torch.randint(3, most, (3, 13))
    if "vision_config" in family.config and name not in TOWERS:
        return pairs(family.config, ids)
    if family.model.endswith(DECODERS):
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, 2:] = 0
    pad = family.config.get("pad_token_id", 0)
    if family.model in TEXT_TOWERS:
        ids[(ids == family.config["eos_token_id"]) | (ids == pad)] = 3
        ids[0, 12] = ids[1, 7] = ids[2, 1] = ids[2, 5] = family.config["eos_token_id"]
        if family.model == "SiglipTextModel":  # it sees its padding
            mask[:] = 1
        return {"input_ids": ids, "attention_mask": mask}
    ids[mask == 0] = pad
    ids[0, 4] = pad
    return {"input_ids": ids, "attention_mask": mask}


def pairs(config: dict, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Texts, which end once or twice, and images; SigLIP sees its padding."""
    end = config["text_config"]["eos_token_id"]
    ids[ids == end] = 3
    ids[0, 12] = ids[1, 7] = ids[2, 2] = ids[2, 5] = end
    size = config["vision_config"]["image_size"]
    mask = torch.ones_like(ids)
    if "projection_dim" in config:
        mask[1, 8:] = 0
    images = torch.randn(2, 3, size, size)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


def in_double(model, batch) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A copy that computes in float64: no processor's rounding is in what it gives.

    ModernBERT stays in float32, as its softmax does: a padded query that sees only
    padding would be NaN.
    """
    if model.config.model_type == "modernbert":
        return model, batch
    double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return copy.deepcopy(model).double(), double


def output_of(found) -> torch.Tensor:
    """A model's logits; of images with texts, a row for each image.

    Of an encoder of CLIP or SigLIP alone, its embeddings.
    """
    for name in ("logits", "logits_per_image", "text_embeds", "image_embeds"):
        if name in found:
            return found[name]
    return found.pooler_output


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    exact, double = in_double(model, batch)
    found = exact(**double)
    logits = output_of(found).float()
    if not 0.5 < logits.abs().max() < 60:
        raise AssertionError(f"logits up to {logits.abs().max()}")
    return logits


def check_shows(what: str, before: torch.Tensor, after: torch.Tensor):
    change = (before - after).abs().max().item()
    if change <= SHOWS:  # not NaN, of a vector of length 0 that was normalised
        raise AssertionError(f"{what} changes the logits by {change} only")


@torch.no_grad()
def check_sensitive(family: Family, model, batch, logits: torch.Tensor):
    """Every parameter and every toggled config field shows in the logits."""
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.fill_(neutral(model, name))
        if not re.match(family.silent, name):
            check_shows(f"{family.model} {name}", logits, output_of(model(**batch)))
        parameter.copy_(kept)
    for toggle in family.toggles:
        other = build(family, model.state_dict(), **toggle)
        check_shows(f"{family.model} {toggle}", logits, output_of(other(**batch)))


@torch.no_grad()
def greedy(model, name: str) -> dict[str, torch.Tensor]:
    """Two prompts and the 8 tokens that `generate` appends: varied, no near ties."""
    seed(name, "prompts")
    model.generation_config.eos_token_id = None
    arrays = {}
    for _ in range(1000):
        i, length = len(arrays) // 2, (4, 7)[len(arrays) // 2]
        prompt = torch.randint(3, 43, (1, length))
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=8,
        )
        new = tokens[0, length:]
        top = model(tokens).logits[0, length - 1 : -1].topk(2).values
        if len(new.unique()) >= 4 and (top[:, 0] - top[:, 1]).min() > 1e-2:
            arrays |= {f"prompt_{i}": prompt[0], f"greedy_{i}": new}
        if len(arrays) == 4:
            return arrays
    raise AssertionError(f"{name}: no varied greedy decoding")


def save_adapter(folder: pathlib.Path, model, name: str, config: dict):
    """Saves a PEFT adapter with random factors, magnitudes and saved modules."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    for key, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in key:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif "modules_to_save" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    written["base_model_name_or_path"] = f"tests/golden/{name}"
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()  # PEFT writes a set's order, which changes.
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    with torch.no_grad():
        return tuned.eval()


def adapted(name: str, family: Family, batch, base: torch.Tensor, kinds=None) -> dict:
    """Saves each adapter, of some kinds or all; PEFT's logits, read from the files."""
    home = HERE / name
    cls = getattr(transformers, family.model)
    arrays = {}
    for kind, config in adapters(name, family).items():
        if kinds is not None and kind not in kinds:
            continue
        seed(name, kind)
        folder = home / (kind if kind == WITH_IMAGES else f"peft_{kind}")
        shutil.rmtree(folder, ignore_errors=True)
        load = {"attn_implementation": "eager"}
        tuned = save_adapter(folder, cls.from_pretrained(home, **load), name, config)
        model = cls.from_pretrained(home, **load)
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
        logits = logits_of(loaded, batch)
        torch.testing.assert_close(logits, logits_of(tuned, batch), rtol=0, atol=0)
        check_shows(f"{name} peft_{kind}", base, logits)
        arrays[f"logits_{kind}"] = logits
    return arrays


def write(file: pathlib.Path, arrays: dict[str, torch.Tensor]):
    np.savez_compressed(file, **{key: value.numpy() for key, value in arrays.items()})


def write_old_config(family: Family, model, batch, logits: torch.Tensor):
    """`config_v4.json`: the config with the keys of transformers 4, checked to load."""
    home = pathlib.Path(model.config.name_or_path)
    new = json.loads((home / "config.json").read_text())
    config = {**new, **family.old}
    config = {k: v for k, v in config.items() if v is not None or k not in family.old}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.51.3"
    (home / "config_v4.json").write_text(json.dumps(config, indent=2) + "\n")
    read = type(model.config).from_json_file(home / "config_v4.json")
    read._attn_implementation = "eager"
    other = type(model)(read).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(other, batch), logits, rtol=0, atol=0)


def make(name: str, family: Family):
    seed(name, "weights")
    home = HERE / name
    shutil.rmtree(home, ignore_errors=True)
    model = build(family)
    batch = make_batch(name, family)
    logits = logits_of(model, batch)
    check_sensitive(family, model, batch, logits)
    arrays = {**batch, "logits": logits}
    if "Classification" in family.model:
        body = getattr(model, model.base_model_prefix)
        with torch.no_grad():
            exact, double = in_double(body, batch)
            hidden = exact(**double).last_hidden_state
        arrays["last_hidden_state"] = hidden.float()
    if "pixel_values" in batch and "input_ids" in batch:
        with torch.no_grad():
            exact, double = in_double(model, batch)
            found = exact(**double)
        arrays["image_embeds"] = found.image_embeds.float()
        arrays["text_embeds"] = found.text_embeds.float()
        arrays["vision_hidden"] = found.vision_model_output.last_hidden_state.float()
        arrays["text_hidden"] = found.text_model_output.last_hidden_state.float()
    model.save_pretrained(home)
    (home / "generation_config.json").unlink(missing_ok=True)
    loaded = type(model).from_pretrained(home, attn_implementation="eager").eval()
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=0, atol=0)
    if family.old:
        write_old_config(family, loaded, batch, logits)
    if family.greedy:
        arrays |= greedy(loaded, name)
    arrays |= adapted(name, family, batch, logits)
    write(home / "reference.npz", arrays)


def make_bert_adapters():
    """Adapters on the model of ``make_bert.py``, whose folder is left as it is."""
    with np.load(HERE / "bert" / "reference.npz") as reference:
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {key: torch.from_numpy(reference[key]) for key in names}
        logits = torch.from_numpy(reference["logits_gelu"])
    arrays = adapted("bert", BERT, batch, logits)
    write(HERE / "bert" / "peft_reference.npz", {**batch, **arrays})


def main(names: list[str]):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in names or [*ALL, "bert"]:
        if name == "bert":
            make_bert_adapters()
        else:
            make(name, ALL[name])
    found = versions("tests/golden/make_models.py")
    (HERE / "versions.json").write_text(json.dumps(found, indent=2) + "\n")


def versions(script: str) -> dict[str, str]:
    """What a script ran with."""
    return {
        "script": script,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
