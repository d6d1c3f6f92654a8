"""An adapter that PEFT wrote comes back from its export as it was."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from lora_jax.config import LoRAConfig
from lora_jax.interop.export import export_adapter
from lora_jax.interop.peft import read_peft
from lora_jax.interop.portable import rewrite_peft
from lora_jax.interop.pretrained import load_model
from lora_jax.tree.paths import flatten
from tests.interop.peft_cases import logits_of
from tests.interop.test_peft_options import BASES, OPTIONS, assert_peft, edited, load
from tests.models.golden import GOLDEN
from tests.nn.tools import key as key_of

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NEW = ("peft_version", "megatron_core", "qalora_group_size", "auto_mapping")


def assert_same(found, wanted, *, but=()):
    tensors, given = load_file(found / FILE), load_file(wanted / FILE)
    copies = {n for n in given if ".original_module." in n or ".modules_to_save." in n}
    assert tensors.keys() == given.keys() - copies
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, given[name], err_msg=name)
    ours, theirs = (json.loads((d / CONFIG).read_text()) for d in (found, wanted))
    known = {key for key in theirs if key in ours or theirs[key]} - {*NEW, *but}
    for key in known - {"base_model_name_or_path"}:
        assert (ours.get(key) or None) == (theirs[key] or None), key


@pytest.mark.parametrize("kind", sorted(BASES))
def test_without_a_base_it_is_the_same(kind, tmp_path):
    out = rewrite_peft(tmp_path / "o", read_peft(OPTIONS / kind), portable=False)
    assert_same(out, OPTIONS / kind)


@pytest.mark.parametrize("kind", ["lora_bias", "tokens", "tokens_named", "tokens_tied"])
def test_what_is_added_to_the_base_is_the_same_with_one(kind, tmp_path):
    words = ["export", "--adapter", str(OPTIONS / kind), "--out", str(tmp_path / "o")]
    assert main([*words, "--model", str(GOLDEN / BASES[kind])]) == 0
    assert_same(tmp_path / "o", OPTIONS / kind)


@pytest.mark.parametrize("kind", ["tokens", "tokens_named", "tokens_tied"])
def test_rows_of_tokens_on_a_model_are_exported_as_such(kind, tmp_path):
    model = load(kind)
    rows = {p: x.shape for p, x in flatten(model.variables["params"]).items()}
    assert all(path.endswith("/token_rows") for path in rows)
    tokens = model.module.config.tokens_by_layer
    assert {path: len(tokens[path.split("/")[0]]) for path in rows} == {
        path: shape[0] for path, shape in rows.items()
    }
    variables = {k: v for k, v in model.variables.items() if k != "frozen"}
    source = GOLDEN / BASES[kind]
    out = export_adapter(tmp_path / "o", variables, model.module.config, source)
    assert_same(out, OPTIONS / kind, but=["trainable_token_indices", "task_type"])
    given = json.loads((OPTIONS / kind / CONFIG).read_text())["trainable_token_indices"]
    given = given if isinstance(given, dict) else {"embed_tokens": given}
    found = json.loads((out / CONFIG).read_text())["trainable_token_indices"]
    assert {name.rpartition(".")[2]: ids for name, ids in found.items()} == given


@pytest.mark.parametrize("scan", [False, True])
def test_any_module_that_our_config_trains_is_one_of_modules_to_save(scan, tmp_path):
    theirs = load("saved_any", scan_layers=scan)
    modules = ["model.norm", "post_attention_layernorm", "down_proj"]
    lora = LoRAConfig(rank=2, alpha=3, targets=["q_proj"], train=modules)
    options = {"lora": lora, "key": key_of(0), "scan_layers": scan}
    ours = load_model(GOLDEN / "llama", **options)
    shapes = [jax.tree.map(np.shape, one.variables["params"]) for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    variables = {**ours.variables, "params": theirs.variables["params"]}
    variables["lora"] = theirs.variables["lora"]
    out = export_adapter(tmp_path / "o", variables, ours.module.config, ours)
    assert_same(out, OPTIONS / "saved_any", but=["modules_to_save", "task_type"])
    saved = json.loads((out / CONFIG).read_text())["modules_to_save"]
    assert saved == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]


def test_rows_beside_a_head_that_the_base_ties_are_not_exported(tmp_path):
    head = {"head": np.zeros((24, 43), np.float32)}
    model = load("tokens_tied")
    config = dataclasses.replace(model.module.config, train=["head"])
    params = {**model.variables["params"], "head": {"kernel": head["head"]}}
    variables = {"lora": model.variables["lora"], "params": params}
    with pytest.raises(ValueError, match="can't be exported with a head of its own"):
        export_adapter(tmp_path / "o", variables, config, GOLDEN / "qwen2")


def test_mlx_has_no_rows_of_tokens(tmp_path):
    model = load("tokens")
    with pytest.raises(
        ValueError, match=r"rows of tokens of .*embed_tokens are trained"
    ):
        export_adapter(
            tmp_path / "o", model.variables, model.module.config, model, format="mlx"
        )


def test_another_base_is_refused(tmp_path):
    words = ["export", "--adapter", str(OPTIONS / "lora_bias")]
    words += ["--out", str(tmp_path / "o")]
    assert main([*words, "--model", str(GOLDEN / "llama")]) == 2
    assert not (tmp_path / "o").exists()


def test_layers_to_transform_stay(tmp_path):
    kept = {"layers_to_transform": [0, 1], "exclude_modules": ["k_proj"]}
    given = edited("tokens", tmp_path, **kept)
    out = rewrite_peft(tmp_path / "o", read_peft(given), portable=False)
    assert_same(out, given)


@pytest.mark.parametrize("scan", [False, True])
def test_lora_bias_on_a_model_is_exported_as_lora_bias(scan, tmp_path):
    model = load("lora_bias", scan_layers=scan)
    config = model.module.config
    out = export_adapter(tmp_path / "o", model.variables, config, model)
    found, wanted = load_file(out / FILE), load_file(OPTIONS / "lora_bias" / FILE)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        exact = {} if name.endswith(".bias") else {"atol": 0, "rtol": 0}
        np.testing.assert_allclose(array, wanted[name], **{"atol": 1e-7, **exact})
    again = load("lora_bias", out)
    assert_peft(logits_of(again.module, again.variables, "gpt2"), "lora_bias")


def test_a_layer_whose_bias_is_not_trained_gets_zeros(tmp_path):
    config = LoRAConfig(
        rank=2, targets=["qkv", "mlp/up"], train=["layer_0/attention/qkv/bias"]
    )
    model = load_model(GOLDEN / "gpt2", lora=config, key=jax.random.key(0))
    out = export_adapter(tmp_path / "o", model.variables, config, model)
    biases = {n: t for n, t in load_file(out / FILE).items() if n.endswith(".bias")}
    assert len(biases) == 4
    assert not any(t.any() for t in biases.values())
    assert load_model(GOLDEN / "gpt2", out).variables["lora"].keys()


@pytest.mark.parametrize("kind", ["lora_bias", "tokens"])
def test_what_no_other_loader_reads_is_not_portable(kind, tmp_path, capsys):
    words = ["export", "--adapter", str(OPTIONS / kind), "--out", str(tmp_path / "o")]
    base = str(GOLDEN / BASES[kind])
    assert main([*words, "--model", base, "--portable"]) == 2
    assert "can't be made portable" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_mlx_has_no_biases_of_updates(tmp_path):
    model = load("lora_bias")
    with pytest.raises(ValueError, match=r"the bias of .*c_attn is trained"):
        export_adapter(
            tmp_path / "o", model.variables, model.module.config, model, format="mlx"
        )
