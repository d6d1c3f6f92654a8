"""MXFP4 weights, as transformers unpacks them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.files.mxfp4 import Mxfp4Reader, unpack
from lora_jax.models.load import load_base
from lora_jax.models.save import save_model
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN


class Files:
    """A reader of tensors in memory."""

    def __init__(self, **tensors):
        self.shapes = {name: array.shape for name, array in tensors.items()}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "mxfp4.npz", allow_pickle=False))


def test_numbers_are_those_that_transformers_unpacks(golden):
    got = unpack(golden["blocks"], golden["scales"])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), golden["unpacked"])


def test_blocks_that_do_not_fit_are_listed_together(golden):
    blocks, scales = golden["blocks"], golden["scales"]
    wrong = {"a_blocks": blocks, "b_blocks": blocks[..., :8], "b_scales": scales}
    with pytest.raises(ValueError, match=r"a: blocks .* scales None; b: blocks .*8"):
        Mxfp4Reader(Files(**wrong))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of sizes that are multiples of 32, its experts in four bits."""
    home = tmp_path_factory.mktemp("mxfp4")
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"layer_types": ["full_attention"]}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (home / "config.json").write_text(json.dumps(config))
    generator, tensors = np.random.default_rng(0), {}
    for name, array in load_file(GOLDEN / "gpt_oss" / "model.safetensors").items():
        if "layers.1" in name:
            continue
        shape = tuple({20: 32, 18: 64, 9: 32}.get(n, n) for n in array.shape)
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = (shape[0], shape[2], shape[1] // 32, 16)
            tensors[f"{name}_blocks"] = generator.integers(0, 256, packed, np.uint8)
            scales = generator.integers(118, 125, packed[:-1], np.uint8)
            tensors[f"{name}_scales"] = scales
        else:
            tensors[name] = generator.normal(size=shape).astype(np.float32)
    save_file(tensors, home / "model.safetensors")
    return home


def test_a_model_is_read_and_saved_in_bfloat16(folder, tmp_path):
    loaded, tensors = load_base(folder), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    wanted = unpack(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    kernel = loaded.params["layer_0"]["mlp"]["experts"]["down"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, wanted)
    save_model(tmp_path / "out", loaded.params, folder)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved[name].dtype == jnp.bfloat16
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in settings
    again = load_base(tmp_path / "out")
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf)
