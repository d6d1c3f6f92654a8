"""Adapters that PEFT wrote compute here what PEFT computes with them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop.pretrained import load_model
from lora_jax.tree.paths import flatten
from tests.interop.peft_cases import (
    CASES,
    adapter_of,
    assert_peft,
    logits_of,
    merged_logits_of,
)
from tests.models.golden import GOLDEN

SCANNED = [("llama", "rslora"), ("gemma3", "rslora"), ("phi3", "dora")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_those_of_peft(family, kind):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
    assert_peft(logits_of(model.module, model.variables, family), family, kind)


@pytest.mark.parametrize(("family", "kind"), SCANNED)
def test_layers_of_a_scanned_model_are_stacked(family, kind):
    model = load_model(
        GOLDEN / family, adapter=adapter_of(family, kind), scan_layers=True
    )
    assert_peft(logits_of(model.module, model.variables, family), family, kind)


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "rslora"), ("bert", "saved"), ("vit", "conv")]
)
def test_merged_parameters_give_the_same_logits(family, kind):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
    assert_peft(merged_logits_of(model.module, model.variables, family), family, kind)


def test_the_config_names_what_is_adapted_and_nothing_else():
    model = load_model(GOLDEN / "llama", adapter=adapter_of("llama", "rslora"))
    config, layer = model.module.config, "layer_1"
    assert config.targets == (
        f"{layer}/attention/query",
        f"{layer}/attention/value",
        f"{layer}/mlp/down",
    )
    rows = {row.path: (row.rank, row.alpha) for row in model.module.targets()}
    assert rows == {
        f"{layer}/attention/query": (4, 3.0),
        f"{layer}/attention/value": (2, 7.0),
        f"{layer}/mlp/down": (1, 2.0),
    }
    assert config.rslora
    query = model.variables["lora"]["layer_1"]["attention"]["query"]
    file = load_file(adapter_of("llama", "rslora") / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(query["lora_a"], file[f"{name}.lora_A.weight"].T)
    np.testing.assert_array_equal(query["lora_b"], file[f"{name}.lora_B.weight"].T)


def test_modules_to_save_are_trained_in_full():
    model = load_model(GOLDEN / "roberta", adapter=adapter_of("roberta", "saved"))
    assert sorted(flatten(model.variables["params"])) == [
        "classifier/bias",
        "classifier/kernel",
        "pooler/bias",
        "pooler/kernel",
    ]
    assert model.module.config.train == ("classifier", "pooler")


def test_a_base_without_a_head_gets_the_adapters(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("classifier")}
    save_file(kept, folder / "model.safetensors")
    model = load_model(folder, adapter=adapter_of("bert", "saved"))
    assert_peft(logits_of(model.module, model.variables, "bert"), "bert", "saved")


def test_a_key_draws_a_new_head_under_an_adapter_too():
    adapter, key = adapter_of("bert", "plain"), jax.random.key(0)
    options = {"num_labels": 3, "key": key}
    model = load_model(GOLDEN / "bert", adapter=adapter, **options)
    wanted = load_model(GOLDEN / "bert", **options).params["classifier"]["kernel"]
    assert 0.01 < float(wanted.std()) < 0.03
    np.testing.assert_array_equal(model.params["classifier"]["kernel"], wanted)


@pytest.fixture
def copy(tmp_path):
    """Copies a golden adapter to be edited."""

    def make(family, kind, **config):
        folder = Path(shutil.copytree(adapter_of(family, kind), tmp_path / kind))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return make


def edit(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def rename(folder, *pairs):
    def change(tensors):
        new = {}
        for name, tensor in tensors.items():
            for old, other in pairs:
                name = name.replace(old, other)
            new[name] = tensor
        return new

    edit(folder, change)


OLD_NAMES = {
    "vit": (
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
        ("vit.layers.", "vit.encoder.layer."),
    ),
    "dinov2": (
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
    ),
}


@pytest.mark.parametrize("family", OLD_NAMES)
def test_adapters_with_the_names_of_transformers_4_load_alike(family, copy):
    """PEFT 0.21.2 takes such a ViT adapter for none, and half of a DINOv2 adapter."""
    targets = ["query", "key", "value", "dense", "fc1", "fc2"]
    old = copy(family, "plain", target_modules=targets)
    rename(old, *OLD_NAMES[family])
    model = load_model(GOLDEN / family, adapter=old)
    wanted = load_model(GOLDEN / family, adapter=adapter_of(family, "plain"))
    assert same(model.variables, wanted.variables)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def error_of(family, folder, **options):
    with pytest.raises(ValueError, match="faults; nothing was loaded") as error:
        load_model(GOLDEN / family, adapter=folder, **options)
    return str(error.value)


def test_all_that_does_not_fit_the_model_is_in_one_error(copy):
    targets = ["q_proj", "v_proj", "k_proj", "head_proj"]
    folder = copy("llama", "saved", target_modules=targets, exclude_modules=["q_proj"])
    layer = "base_model.model.model.layers.0"

    def change(tensors):
        new = dict(tensors)
        for x in "AB":
            name = f"{layer}.self_attn.v_proj.lora_{x}.weight"
            new[name.replace("v_proj", "head_proj")] = tensors[name]
            new[name.replace("layers.0", "layers.7")] = tensors[name]
        new[f"{layer}.self_attn.v_proj.lora_B.weight"] = np.ones((11, 3), np.float32)
        new["base_model.model.score.weight"] = np.ones((2, 20), np.float32)
        new["base_model.model.lm_head.weight"] = np.ones((42, 20), np.float32)
        return new

    edit(folder, change)
    message = error_of("llama", folder)
    self = "model.layers.0.self_attn"
    for line in (
        f"unexpected: {self}.head_proj is not a module of this model. Did you mean: ",
        "unexpected: model.layers.7.self_attn.v_proj is not a module",
        f"unexpected: factors of {self}.q_proj, which the config does not target",
        f"missing: factors of {self}.k_proj, which target_modules names",
        "shape: B of layer_0/attention/value must be [12, 3]; got [11, 3]",
        "unexpected: score.weight is not a parameter of this model",
        "shape: lm_head.weight must be [20, 43] in Flax's layout; got [20, 42]",
    ):
        assert line in message


def test_a_saved_module_must_be_whole(copy):
    folder = copy("bert", "saved")
    edit(folder, lambda t: {n: x for n, x in t.items() if n[-15:] != "classifier.bias"})
    message = error_of("bert", folder, num_labels=4)
    assert "missing: classifier.bias, whose module is in modules_to_save" in message


def test_another_base_is_noticed_by_the_copies_in_the_file(copy):
    folder = copy("llama", "embed")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(folder, lambda t: t | {name: 1.1 * t[name]})
    assert "differs from this base's by 10.0% of its norm" in error_of("llama", folder)
    edit(folder, lambda t: t | {name: t[name][:-1]})
    assert "[42, 20] in the adapter and [43, 20] here" in error_of("llama", folder)


def test_unknown_keys_are_warned_of(copy):
    folder = copy("llama", "rslora", new_idea=3)
    with pytest.warns(
        UserWarning, match="has unknown keys, which are ignored: .*new_idea"
    ):
        load_model(GOLDEN / "llama", adapter=folder)


def test_layers_of_other_ranks_and_scalings_share_a_scanned_array(tmp_path, copy):
    """One layer of rank 1 and another scaling, one of rank 3, one without adapter."""
    folder = copy("gemma3", "plain", target_modules=["layers.0.mlp.up_proj", "q_proj"])
    file = json.loads((folder / "adapter_config.json").read_text())
    file |= {
        "rank_pattern": {"layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    }
    (folder / "adapter_config.json").write_text(json.dumps(file))

    def change(tensors):
        kept = {n: x for n, x in tensors.items() if "q_proj" in n or "0.mlp.up" in n}
        for name, x in kept.items():
            if "layers.0.self_attn" in name:
                kept[name] = x[:1] if "lora_A" in name else x[:, :1].copy()
        return kept

    edit(folder, change)
    plain = load_model(GOLDEN / "gemma3", adapter=folder)
    scanned = load_model(GOLDEN / "gemma3", adapter=folder, scan_layers=True)
    logits = [logits_of(m.module, m.variables, "gemma3") for m in (plain, scanned)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=5e-5)
