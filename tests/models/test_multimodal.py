"""The language model of a multimodal folder: what is read and what is kept."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import LoRAConfig
from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.load import param_shapes
from lora_jax.models.save import save_model
from lora_jax.models.source import read_settings
from tests.interop.peft_cases import assert_peft, logits_of
from tests.models.golden import GOLDEN

TOWERS = ("gemma3_tower", "gemma4_tower", "mistral3", "qwen2_5_vl", "qwen3_vl")
ADAPTER = "adapter_model.safetensors"
INSIDE = "base_model.model.model.language_model."
GEMMA = GOLDEN / "gemma3_tower"


def renamed(source, target, change):
    """Copies a folder with other names of its tensors."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        save_file({change(n): t for n, t in load_file(file).items()}, file)
    return target


def text_only(target):
    """The language model of the golden Gemma 3 as a folder of its own."""
    target.mkdir()
    config = json.loads((GEMMA / "config.json").read_text())["text_config"]
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(GEMMA / "model.safetensors")
    kept = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.")
    }
    save_file(kept, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", TOWERS)
def test_a_merge_writes_the_folder_whole(name, tmp_path):
    model = load_model(GOLDEN / name)
    params = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    save_model(tmp_path / "out", params, model.path)
    original = load_file(GOLDEN / name / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == original.keys()
    assert set(model.unused) == {n for n in original if re.search("vis|multi", n)}
    for tensor in original:
        times = 1 if tensor in model.unused else 2
        want = times * original[tensor]
        np.testing.assert_array_equal(written[tensor], want, err_msg=tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["gemma3_tower", "qwen2_5_vl"])
def test_of_an_adapter_with_images_the_language_models_part_is_taken(name):
    kind = "with_images"
    with pytest.warns(UserWarning, match=r"for images or sound \(model\.vis.*\d more"):
        model = load_model(GOLDEN / name, adapter=GOLDEN / name / kind)
    assert_peft(logits_of(model.module, model.variables, name), name, kind)


def test_one_adapter_fits_the_whole_folder_and_the_language_model_alone(tmp_path):
    plain, text = GEMMA / "peft_plain", text_only(tmp_path / "text")
    alone = load_model(text, adapter=plain)
    assert_peft(
        logits_of(alone.module, alone.variables, "gemma3_tower"),
        "gemma3_tower",
        "plain",
    )
    written = tmp_path / "of_text"  # and back: PEFT's names for the language model
    export_adapter(written, alone.variables, alone.module.config, alone)
    names = load_file(written / ADAPTER)
    assert all(n.startswith("base_model.model.model.layers.") for n in names)
    spellings = {
        "of_text": "base_model.model.model.",
        "transformers_4": "base_model.model.language_model.model.",
    }
    old = renamed(
        plain,
        tmp_path / "transformers_4",
        lambda n: n.replace(INSIDE, spellings["transformers_4"]),
    )
    for folder in (written, old):
        whole = load_model(GEMMA, adapter=folder)
        assert jax.tree.all(
            jax.tree.map(
                np.array_equal, whole.variables["lora"], alone.variables["lora"]
            )
        )


def test_a_wrapped_layer_of_the_same_name_is_told_apart(tmp_path):
    lora = LoRAConfig(rank=1, targets=["query"])
    model = load_model(GOLDEN / "gemma4_tower", lora=lora, key=jax.random.key(0))
    assert any(name.endswith("q_proj.linear.weight") for name in model.unused)
    export_adapter(tmp_path, model.variables, lora, model)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())[
        "target_modules"
    ]
    layers = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert targets == layers


def test_mlx_wraps_the_language_model(tmp_path):
    lora = LoRAConfig(rank=2, targets=["query", "head"])
    model = load_model(GOLDEN / "mistral3", lora=lora, key=jax.random.key(0))
    export_adapter(tmp_path, model.variables, lora, model, format="mlx")
    names = load_file(tmp_path / "adapters.safetensors")
    assert "language_model.lm_head.lora_a" in names
    assert "language_model.model.layers.1.self_attn.q_proj.lora_a" in names
    again = load_model(GOLDEN / "mistral3", adapter=tmp_path)
    found = again.variables["lora"]["head"]["lora_a"]
    np.testing.assert_array_equal(found, model.variables["lora"]["head"]["lora_a"])


@pytest.mark.parametrize("name", ["gemma3_tower", "mistral3", "qwen2_5_vl"])
def test_tensor_names_of_every_version_are_read(name, tmp_path):
    prefixes = ("language_model.model.", "model.language_model.", "model.")

    def change(tensor):
        outer = ("vision_tower.", "visual.", "multi_modal_projector.")
        if tensor.startswith(outer):
            return "model." + tensor
        if tensor.endswith("lm_head.weight"):
            return "lm_head.weight"
        found = next(p for p in prefixes if tensor.startswith(p))
        return "model.language_model." + tensor.removeprefix(found)

    new = renamed(GOLDEN / name, tmp_path / "new", change)
    one, other = load_model(GOLDEN / name), load_model(new)
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))
    assert len(one.unused) == len(other.unused)


def test_a_tied_table_is_what_the_file_has(tmp_path):
    folder = shutil.copytree(GEMMA, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["tie_word_embeddings"] = False  # the whole's says True
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_model(folder).config == load_model(GEMMA).config


def test_a_mistral_3_folder_may_hold_either_language_model():
    settings = json.loads((GOLDEN / "ministral3" / "config.json").read_text())
    whole = {"model_type": "mistral3", "text_config": settings}
    found = FAMILIES["mistral3"].read_config(whole)
    assert found == FAMILIES["ministral3"].read_config(settings)
    assert found.query_growth == (0.5, 5)


HUB = {  # as on the hub, what does not matter here left out
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        3_880_263_168,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        {
            "model_type": "qwen2_5_vl",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_configs_of_real_checkpoints_give_their_sizes(name, tmp_path):
    settings, count = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    settings = read_settings(tmp_path)
    family = FAMILIES[settings["model_type"]]
    config = family.read_config(settings)
    shapes = param_shapes(family, family.module(config, scan_layers=True))
    assert sum(map(np.prod, shapes.values())) == count


def test_a_strange_language_model_is_named(tmp_path):
    folder = shutil.copytree(GEMMA, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())

    def error(**changes):
        text = settings["text_config"] | changes
        whole = json.dumps(settings | {"text_config": text})
        (folder / "config.json").write_text(whole)
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            load_model(folder)
        return str(caught.value)

    assert "must be one of ['gemma3_text']; got 'llama'" in error(model_type="llama")
    kinds = ["linear_attention", "full_attention", "chunked_attention"]
    wanted = "got ['chunked_attention', 'linear_attention']"
    assert wanted in error(layer_types=kinds)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_txt"}))
    with pytest.raises(
        ValueError, match=r"got 'gemma3_txt'. Did you mean: gemma3_text"
    ):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"text_config": 3}))
    with pytest.raises(ValueError, match=r"text_config must be an object; got 3"):
        load_model(folder)


def test_what_stays_on_disk_is_one_line():
    model = load_model(GEMMA)
    wanted = "multi_modal_projector, vision_tower: 23 tensors stay on disk"
    assert model.unused_text().startswith(wanted)
    llama = load_model(GOLDEN / "llama")
    assert llama._replace(unused=("a", "b")).unused_text() == "a, b"
