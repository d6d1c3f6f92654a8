"""An adapter of one side of a tied table survives this library's own format."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from lora_jax.files.adapter import save_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.tree.fingerprint import fingerprint
from tests.interop.peft_cases import logits_of
from tests.models.golden import GOLDEN

OPTIONS = GOLDEN / "peft_options"
FILE = "adapter_model.safetensors"
SIDES = ["embed", "head", "both", "saved_embed", "saved_head"]


def saved(kind, folder):
    model = load_model(GOLDEN / "qwen2", OPTIONS / kind)
    base = fingerprint(model.variables["frozen"])
    extra = {"model": str(GOLDEN / "qwen2")}
    variables, config = model.variables, model.module.config
    save_adapter(folder, variables, config, base, extra=extra)
    return model


@pytest.mark.parametrize("kind", SIDES)
def test_one_side_of_a_tied_table_is_loaded_as_it_was_saved(kind, tmp_path):
    model = saved(kind, tmp_path / "own")
    again = load_model(GOLDEN / "qwen2", tmp_path / "own")
    assert not again.config.is_tied
    np.testing.assert_array_equal(
        logits_of(again.module, again.variables, "qwen2"),
        logits_of(model.module, model.variables, "qwen2"),
    )


@pytest.mark.parametrize("kind", SIDES)
def test_one_side_of_a_tied_table_is_exported_as_that_side(kind, tmp_path):
    saved(kind, tmp_path / "own")
    words = ["--adapter", str(tmp_path / "own"), "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    found, wanted = load_file(tmp_path / "out" / FILE), load_file(OPTIONS / kind / FILE)
    copies = {name for name in wanted if ".base_layer." in name}
    assert found.keys() == wanted.keys() - copies
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_an_adapter_of_both_sides_keeps_them_tied(tmp_path):
    saved("ensure", tmp_path / "own")
    assert load_model(GOLDEN / "qwen2", tmp_path / "own").config.is_tied
    words = ["--adapter", str(tmp_path / "own"), "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]


def test_another_base_is_still_another_base(tmp_path):
    saved("embed", tmp_path / "own")
    with pytest.raises(ValueError, match="was trained on the base"):
        load_model(GOLDEN / "qwen2", tmp_path / "own", param_dtype="bfloat16")
