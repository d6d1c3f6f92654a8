"""PEFT's less common options compute here what PEFT computes with them."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.save import save_model
from tests.golden.make_exports import make_base
from tests.interop.peft_cases import inputs, logits_of
from tests.models.golden import GOLDEN

OPTIONS = GOLDEN / "peft_options"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASES = {
    folder.name: json.loads((folder / CONFIG).read_text())[
        "base_model_name_or_path"
    ].rpartition("/")[2]
    for folder in sorted(OPTIONS.glob("*/"))
}
DECODERS = [kind for kind, base in BASES.items() if base != "bert"]


def wanted(kind):
    with np.load(OPTIONS / "reference.npz") as reference:
        return reference[kind]


def edited(kind, target, **settings):
    folder = shutil.copytree(OPTIONS / kind, target / kind)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder


def load(kind, adapter=None, **options):
    return load_model(GOLDEN / BASES[kind], adapter or OPTIONS / kind, **options)


def assert_peft(logits, kind):
    np.testing.assert_allclose(logits, wanted(kind), rtol=1e-5, atol=6e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_those_of_peft(kind):
    model = load(kind)
    assert_peft(logits_of(model.module, model.variables, BASES[kind]), kind)


@pytest.mark.parametrize("kind", ["head", "tokens_named", "lora_bias"])
def test_scanned_layers_give_the_same_logits(kind):
    model = load(kind, scan_layers=True)
    assert_peft(logits_of(model.module, model.variables, BASES[kind]), kind)


@pytest.mark.parametrize("kind", ["embed", "saved_head", "gpt2_head", "tokens_tied"])
def test_a_merged_folder_gives_the_same_logits(kind, tmp_path):
    model = load(kind)
    merged = model.module.merge(model.variables)
    save_model(tmp_path / "out", merged, model.path)
    again = load_model(tmp_path / "out")
    assert_peft(logits_of(again.module, again.variables, BASES[kind]), kind)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is (kind == "tokens_tied")


@pytest.mark.parametrize("kind", ["embed", "head", "both", "saved_head"])
def test_an_adapter_of_one_side_comes_back_from_its_export(kind, tmp_path):
    model = load(kind)
    base = GOLDEN / BASES[kind]
    trained = {k: v for k, v in model.variables.items() if k != "frozen"}
    for name, variables, source in (
        ("model", model.variables, model),
        ("path", trained, base),
    ):
        if name == "path" and kind == "embed":
            continue  # nothing in it says that the head has a kernel of its own
        out = export_adapter(tmp_path / name, variables, model.module.config, source)
        again = load(kind, out)
        assert_peft(logits_of(again.module, again.variables, BASES[kind]), kind)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_one_side_is_enough_where_the_config_ensures_that_both_are_tied(side, tmp_path):
    folder = edited("ensure", tmp_path)
    tensors = load_file(folder / FILE)
    other = "lm_head" if side == "embed_tokens" else "embed_tokens"
    save_file({n: t for n, t in tensors.items() if other not in n}, folder / FILE)
    if side == "lm_head":
        config = json.loads((folder / CONFIG).read_text())
        config["target_modules"] = ["lm_head", "q_proj"]
        (folder / CONFIG).write_text(json.dumps(config))
    model = load("ensure", folder)
    assert "head" not in model.params
    assert_peft(logits_of(model.module, model.variables, "qwen2"), "ensure")


def test_an_adapter_of_a_layer_on_which_no_output_depends_is_left_out(tmp_path):
    base = make_base("bert", "bare", tmp_path / "base")
    with pytest.warns(UserWarning, match=r"pooler\.dense is left out; no output"):
        model = load_model(base, OPTIONS / "bare_bert")
    run = jax.jit(lambda v, *xs: model.module.apply(v, *xs, method="embed"))
    found = run(model.variables, *inputs("bert"))
    np.testing.assert_allclose(found, wanted("bare_bert"), rtol=1e-5, atol=6e-5)


def test_the_pooler_s_adapter_is_kept_where_the_output_depends_on_it(tmp_path):
    base = make_base("bert", "bare", tmp_path / "base")
    model = load_model(base, OPTIONS / "bare_bert", pooling="pooler")
    assert "pooler" in model.variables["lora"]


@pytest.mark.parametrize("pattern", [None, [], ""])
def test_an_empty_layers_pattern_is_any_pattern(pattern, tmp_path):
    source = GOLDEN / "llama" / "peft_rslora"
    folder = shutil.copytree(source, tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"layers_pattern": pattern, "layers_to_transform": [1]}
    config["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    (folder / CONFIG).write_text(json.dumps(config))
    model = load_model(GOLDEN / "llama", folder)
    assert set(model.variables["lora"]) == {"layer_1"}


def test_all_linear_is_read_in_any_case(tmp_path):
    folder = edited("embed", tmp_path, target_modules="All-Linear")
    tensors = load_file(folder / FILE)
    kept = {n: t for n, t in tensors.items() if "embed_tokens" not in n}
    save_file(kept, folder / FILE)
    assert set(load("embed", folder).variables["lora"]) == {"layer_0", "layer_1"}


def test_a_bias_of_an_update_needs_a_layer_with_a_bias(tmp_path):
    folder = edited("tokens", tmp_path, lora_bias=True, trainable_token_indices=None)
    tensors = load_file(folder / FILE)
    biases = {
        name.replace("lora_B.weight", "lora_B.bias"): np.ones(len(t), np.float32)
        for name, t in tensors.items()
        if "lora_B" in name
    }
    kept = {n: t for n, t in tensors.items() if "token" not in n or "embed" not in n}
    save_file(kept | biases, folder / FILE)
    with pytest.raises(
        ValueError, match=r"lora_bias of layer_0/attention/query, a layer without"
    ):
        load("tokens", folder)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("tokens", {"trainable_token_indices": [3, 7]}, r"each of its 2 tokens .* \[3"),
        ("tokens", {"trainable_token_indices": None}, "each of its 0 tokens"),
        ("tokens", {"trainable_token_indices": [3, 7, 99]}, "up to 99"),
        ("tokens", {"trainable_token_indices": [3, 3, 7]}, "each once"),
        ("lora_bias", {"lora_bias": False}, "lora_B.bias of .* with lora_bias false"),
        ("embed", {"lora_bias": True}, r"missing: .*q_proj\.lora_B\.bias"),
        ("lora_bias", {"use_dora": True}, "lora_bias must be false with use_dora"),
    ],
)
def test_options_that_do_not_fit_the_file_are_errors(kind, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(kind, edited(kind, tmp_path, **settings))


def test_second_copies_of_a_saved_bias_must_be_equal(tmp_path):
    folder = edited("saved_norm", tmp_path)
    tensors = load_file(folder / FILE)
    tensors["base_model.model.transformer.ln_f.modules_to_save.bias"] += 1
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match=r"duplicate: .*modules_to_save\.bias differs"):
        load("saved_norm", folder)


@pytest.mark.parametrize("kind", ["embed", "head", "saved_embed", "saved_head"])
def test_an_adapter_of_a_resized_vocabulary_says_so(kind, tmp_path):
    folder = edited(kind, tmp_path)
    tensors = load_file(folder / FILE)
    with np.load(GOLDEN / "qwen2" / "reference.npz") as reference:
        size = reference["logits"].shape[-1]

    def longer(array):
        pads = [(0, 3 if n == size else 0) for n in array.shape]
        return np.pad(array, pads)

    tensors = {n: longer(t) for n, t in tensors.items() if ".base_layer." not in n}
    save_file(tensors, folder / FILE)
    message = rf"vocabulary of {size + 3} tokens, resized from the {size} of this base"
    with pytest.raises(ValueError, match=message):
        load(kind, folder)
