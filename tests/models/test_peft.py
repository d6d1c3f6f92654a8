"""Adapters that PEFT wrote compute here what PEFT computes with them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.models.pretrained import load_model
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN
from tests.models.peft_cases import (
    CASES,
    adapter_of,
    assert_peft,
    logits_of,
    merged_logits_of,
)

SCANNED = [("llama", "rslora"), ("gemma3", "rslora"), ("phi3", "dora")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_those_of_peft(family, kind):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
    assert_peft(logits_of(model.module, model.variables, family), family, kind)


@pytest.mark.parametrize(("family", "kind"), SCANNED)
def test_layers_of_a_scanned_model_are_stacked(family, kind):
    model = load_model(
        GOLDEN / family, adapter=adapter_of(family, kind), is_scanned=True
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
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
