"""Adapters of experts: PEFT's wrappers of parameters, and names of single experts."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config import LoRAConfig
from lora_jax.interop.experts import join_experts
from lora_jax.interop.export import export_adapter
from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.naming import Names
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from tests.interop.peft_cases import adapter_of, assert_peft, logits_of
from tests.models.golden import GOLDEN

FILE = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model():
    return load_model(
        GOLDEN / "qwen3_moe", adapter=adapter_of("qwen3_moe", "parameters")
    )


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_each_expert_has_its_own_ranks(model):
    rows = {t.path: (t.rank, t.alpha) for t in model.module.targets()}
    assert rows["layer_1/mlp/experts/gate_up"] == (3, 5.0)
    assert rows["layer_1/mlp/experts/down"] == (2, 5.0)
    file = load_file(adapter_of("qwen3_moe", "parameters") / FILE)
    both = model.variables["lora"]["layer_1"]["mlp"]["experts"]["gate_up"]
    a = file[f"{LAYER}.base_layer.lora_A.weight"]  # row e r + j: rank j of expert e
    b = file[f"{LAYER}.base_layer.lora_B.weight"]  # column j e + i: rank j of expert i
    np.testing.assert_array_equal(both["lora_a"][4, :, 1], a[4 * 3 + 1])
    np.testing.assert_array_equal(both["lora_b"][4, 1], b[:, 1 * 5 + 4])


def test_an_exported_adapter_is_the_file_that_peft_wrote(model, tmp_path):
    export_adapter(tmp_path / "out", model.variables, model.module.config, model)
    wanted = load_file(adapter_of("qwen3_moe", "parameters") / FILE)
    got = load_file(tmp_path / "out" / FILE)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    settings = settings_of(tmp_path / "out")
    layers = [f"model.layers.{i}.mlp.experts." for i in range(2)]
    wanted = [layer + end for layer in layers for end in ("down_proj", "gate_up_proj")]
    assert settings["target_parameters"] == wanted
    assert settings["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3_moe", ("mlp.experts.3.gate_proj", "mlp.experts.3.down_proj")),
        ("mixtral", ("block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.w2")),
    ],
)
def test_a_portable_adapter_names_every_expert_and_reads_back(name, ends, tmp_path):
    found = load_model(GOLDEN / name, adapter=adapter_of(name, "parameters"))
    config, out = found.module.config, tmp_path / "out"
    export_adapter(out, found.variables, config, found, portable=True)
    file, settings = load_file(out / FILE), settings_of(out)
    assert (settings["r"], settings["lora_alpha"]) == (3, 3)
    assert "target_parameters" not in settings
    assert {end.rpartition(".")[2] for end in ends} < set(settings["target_modules"])
    for end in ends:
        key = f"base_model.model.model.layers.1.{end}.lora_A.weight"
        assert len(file[key]) == 3
    again = load_model(GOLDEN / name, adapter=out)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_model(GOLDEN / "mistral", adapter=out)  # a dense model
    assert str(error.value).count("is not a module of this model") == 2 * 5 * 3
    rows = {t.path: t.rank for t in again.module.targets()}
    assert rows["layer_0/mlp/experts/gate_up"] == 6  # gate's and up's
    assert_peft(logits_of(again.module, again.variables, name), name, "parameters")
    del file["base_model.model.model.layers.1." + ends[0] + ".lora_A.weight"]
    del file["base_model.model.model.layers.1." + ends[0] + ".lora_B.weight"]
    save_file(file, out / FILE)
    with pytest.raises(ValueError, match=rf"missing: factors of .*{ends[0]}"):
        load_model(GOLDEN / name, adapter=out)


def test_names_of_single_experts_target_all_of_them():
    found = load_model(
        GOLDEN / "mixtral",
        lora=LoRAConfig(rank=2, targets=["q_proj", "w1", "w2", "w3"]),
        key=jax.random.key(0),
    )
    paths = [t.path for t in found.module.targets(found.params)]
    assert paths[:3] == [
        "layer_0/attention/query",
        "layer_0/mlp/experts/gate_up",
        "layer_0/mlp/experts/down",
    ]


def test_experts_on_a_dense_model_are_one_error():
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_model(GOLDEN / "qwen3", adapter=adapter_of("qwen3_moe", "parameters"))
    for i in range(2):
        for end in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{i}.mlp.experts.{end}"
            assert f"unexpected: {name} is not a module of this model" in str(
                error.value
            )


def test_factors_of_another_number_of_experts_are_an_error(tmp_path):
    folder = shutil.copytree(adapter_of("qwen3_moe", "parameters"), tmp_path / "a")
    tensors = load_file(folder / FILE)
    tensors[f"{LAYER}.lora_A.weight"] = tensors[f"{LAYER}.lora_A.weight"][:8]
    tensors[f"{LAYER}.lora_B.weight"] = tensors[f"{LAYER}.lora_B.weight"][:, :8].copy()
    save_file(tensors, folder / FILE)
    wanted = r"A of layer_1/mlp/experts/down must be \[5, 2, 7\]; got \[4, 2, 7\]"
    with pytest.raises(ValueError, match=wanted):
        load_model(GOLDEN / "qwen3_moe", adapter=folder)
    tensors[f"{LAYER}.lora_A.weight"] = tensors[f"{LAYER}.lora_A.weight"][:7]
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match=r"must be \[experts \* 2, in\], .* \[7, 7\]"):
        load_model(GOLDEN / "qwen3_moe", adapter=folder)


def test_experts_of_one_layer_must_have_factors_of_one_shape():
    family = FAMILIES["mixtral"]
    path = "layer_0/mlp/experts/down"
    names = Names(family, [path], [])
    file = "model.layers.0.block_sparse_moe.experts.{}.w2"
    modules = {
        file.format(i): ExternalFactors(
            np.ones((2 + i, 9)), np.ones((20, 2 + i)), 1.5, 3.0
        )
        for i in range(2)
    }
    adapter = ExternalAdapter(modules, {}, {}, {})
    _, faults = join_experts(adapter, names, {path: 2})
    (spelled,) = names.spelling().modules.values()
    assert faults == [
        f"{spelled}: the experts of a layer must have factors of one shape and one "
        "scaling; got A (2, 9) and (3, 9), B (20, 2) and (20, 3), scaling 1.5."
    ]


def test_dora_of_experts_has_no_file(tmp_path):
    config = LoRAConfig(rank=2, targets=["experts/down"], dora=True)
    found = load_model(GOLDEN / "qwen3_moe", lora=config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="DoRA of experts can't be exported"):
        export_adapter(tmp_path / "out", found.variables, config, found)
