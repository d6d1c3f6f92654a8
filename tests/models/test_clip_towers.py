"""CLIP's and SigLIP's encoders in folders of their own, against transformers."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.finetune.encode import encode
from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.load import load_base
from lora_jax.models.save import save_model
from tests.models.golden import GOLDEN

NAMES = ("clip_text", "clip_vision", "siglip_text", "siglip_vision")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
by_name = pytest.mark.parametrize("name", NAMES)


def read(name):
    return dict(np.load(GOLDEN / name / "reference.npz", allow_pickle=False))


@by_name
def test_lines_have_the_embeddings_of_transformers(name):
    loaded, golden = load_base(GOLDEN / name), read(name)
    if "vision" in name:
        lines = [{"pixel_values": x.tolist()} for x in golden["pixel_values"]]
    else:
        sizes = golden["attention_mask"].sum(axis=1)
        ids = zip(golden["input_ids"], sizes, strict=True)
        lines = [{"input_ids": row[:size].tolist()} for row, size in ids]
    rows = encode(loaded, lines, "data.jsonl", batch_size=2).lines
    got = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(got, golden["logits"], **TOLERANCE)


@by_name
def test_a_folder_with_other_names_is_the_same_and_is_saved_with_them(name, tmp_path):
    """transformers 4 wrote the prefix that 5 leaves out, and the other way round."""
    loaded, prefix = load_base(GOLDEN / name), FAMILIES[f"{name}_model"].prefix
    folder = shutil.copytree(
        GOLDEN / name, tmp_path / name, ignore=shutil.ignore_patterns("peft_*", "*.npz")
    )
    tensors = load_file(folder / "model.safetensors")
    has_prefix = any(key.startswith(prefix) for key in tensors)
    other = {
        key.removeprefix(prefix)
        if has_prefix
        else (key if key.startswith("projection") else prefix + key): tensor
        for key, tensor in tensors.items()
    }
    assert other.keys() != tensors.keys()
    save_file(other, folder / "model.safetensors")
    again = load_base(folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    for source in (loaded, again):
        out = tmp_path / f"out_{source is again}"
        save_model(out, source.params, source.path)
        wanted = load_file(source.path / "model.safetensors")
        got = load_file(out / "model.safetensors")
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


@by_name
def test_an_adapter_of_peft_comes_back_as_it_was(name, tmp_path):
    loaded = load_model(GOLDEN / name, GOLDEN / name / "peft_plain")
    export_adapter(tmp_path / "out", loaded.variables, loaded.module.config, loaded)
    file = "adapter_model.safetensors"
    wanted = load_file(GOLDEN / name / "peft_plain" / file)
    got = load_file(tmp_path / "out" / file)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


def test_the_projection_goes_by_the_class_and_the_end_by_the_config():
    settings = json.loads((GOLDEN / "clip_text" / "config.json").read_text())
    read_config = FAMILIES["clip_text_model"].read_config
    config = read_config(settings)
    assert (config.width, config.end_id) == (17, 37)
    old = settings | {"architectures": ["CLIPTextModel"], "eos_token_id": 2}
    config = read_config(old)
    assert (config.width, config.end_id) == (None, None)
    settings = json.loads((GOLDEN / "siglip_vision" / "config.json").read_text())
    with pytest.raises(ValueError, match="vision_use_head must be True"):
        FAMILIES["siglip_vision_model"].read_config(
            settings | {"vision_use_head": False}
        )
