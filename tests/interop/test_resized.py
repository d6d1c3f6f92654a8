"""Vocabularies with new tokens, as transformers and PEFT resize them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoRAConfig, load_model
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.interop.export import export_adapter
from lora_jax.models.save import save_model
from tests.golden.make_exports import HERE
from tests.nn.tools import key
from tests.tiny_decoder import make_decoder

RESIZED, NEW = HERE / "resized", ["<tool>", "</tool>"]
TEXT = "what is <tool> sky ? </tool> blue ."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    names = {"rows": "llama", "tied": "qwen2", "saved": "qwen2"}
    made = {name: make_decoder(place / name, name) for name in {*names.values()}}
    return {kind: made[name] for kind, name in names.items()}


@pytest.fixture(scope="module")
def loaded(bases):
    return {kind: load_model(bases[kind], RESIZED / kind) for kind in bases}


def wanted(kind):
    with np.load(RESIZED / "reference.npz") as reference:
        return reference[kind], reference["ids"]


def assert_peft(model, kind):
    logits, ids = wanted(kind)
    assert model.tokenizer.encode_text(TEXT).ids == ids[0].tolist()
    found = jax.jit(model.module.apply)(model.variables, jnp.asarray(ids))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=6e-5)


@pytest.mark.parametrize("kind", ["rows", "tied", "saved"])
def test_logits_on_the_base_as_it_was_are_those_of_peft(kind, loaded):
    model = loaded[kind]
    assert model.added == tuple(NEW)
    assert model.config.vocab_size == 45
    assert ("head" in model.params) == (kind == "rows")
    assert_peft(model, kind)


@pytest.mark.parametrize("kind", ["rows", "tied", "saved"])
def test_a_merged_folder_has_the_tokens_the_rows_and_the_size(kind, loaded, tmp_path):
    model = loaded[kind]
    merged = model.module.merge(model.variables, check=False)
    save_model(tmp_path / "m", merged, model.path, add_tokens=model.added)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert settings["vocab_size"] == 45
    assert_peft(load_model(tmp_path / "m"), kind)


@pytest.mark.parametrize("kind", ["rows", "tied"])
def test_an_export_has_peft_s_tensors_and_a_tokenizer(kind, loaded, tmp_path):
    model = loaded[kind]
    config = model.module.config
    out = export_adapter(tmp_path / "o", model.variables, config, model)
    found, given = load_file(out / FILE), load_file(RESIZED / kind / FILE)
    for name, array in found.items():
        np.testing.assert_array_equal(array, given[name], err_msg=name)
    left = given.keys() - found.keys()  # the resized tables, and a tied head's rows
    assert all(".token_adapter." in name for name in left)
    if kind == "rows":
        assert all(name.endswith(".base_layer.weight") for name in left)
    tokenizer, theirs = (load_tokenizer(f) for f in (out, RESIZED / kind))
    assert tokenizer.encode_text(TEXT).ids == theirs.encode_text(TEXT).ids
    assert_peft(load_model(model.path, out), kind)


def test_without_the_tokenizer_the_size_is_told(bases, tmp_path):
    folder = shutil.copytree(RESIZED / "rows", tmp_path / "a")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="or one whose vocabulary was resized"):
        load_model(bases["rows"], folder)
    assert_peft(load_model(bases["rows"], folder, add_tokens=NEW), "rows")


def test_fresh_rows_are_the_mean_and_are_trained(bases):
    lora = LoRAConfig(rank=2, targets=["q_proj"], tokens=["sky"])
    model = load_model(bases["rows"], lora=lora, key=key(0), add_tokens=NEW)
    assert model.module.config.tokens_by_layer == {
        "embed": (12, 43, 44),
        "head": (43, 44),
    }
    old = load_model(bases["rows"]).params
    table, kernel = old["embed"]["embedding"], old["head"]["kernel"]
    rows = model.variables["params"]
    for found, mean in (
        (rows["embed"]["token_rows"][1:], table.mean(0)),
        (rows["head"]["token_rows"], kernel.mean(1)),
        (model.params["embed"]["embedding"][43:], table.mean(0)),
    ):
        np.testing.assert_allclose(found, np.tile(mean, (2, 1)), rtol=1e-5, atol=1e-6)
    assert (model.params["embed"]["embedding"][:43] == table).all()
    full = LoRAConfig(rank=2, targets=["q_proj"], train=["embed"])
    whole = load_model(bases["rows"], lora=full, key=key(0), add_tokens=NEW)
    assert whole.module.config.tokens_by_layer == {"head": (43, 44)}


def test_rows_to_spare_are_used_before_a_table_grows(bases, tmp_path):
    folder = shutil.copytree(bases["rows"], tmp_path / "spare")
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    for word in ("w25", "w26"):
        del settings["model"]["vocab"][word]
    settings["model"]["vocab"] = {
        w: i for i, w in enumerate(settings["model"]["vocab"])
    }
    file.write_text(json.dumps(settings))
    model = load_model(folder, add_tokens=[*NEW, "<more>"])
    assert model.config.vocab_size == 44
    assert [model.tokenizer.token_id(t) for t in model.added] == [41, 42, 43]
    table, old = (
        load_model(folder, **o).params["embed"]["embedding"]
        for o in ({"add_tokens": NEW}, {})
    )
    assert table.shape == old.shape
    np.testing.assert_allclose(
        table[41:], np.tile(old[:41].mean(0), (2, 1)), rtol=1e-5, atol=1e-6
    )


def test_every_bad_token_is_in_one_error(bases):
    tokens = ["<tool>", "sky", "<tool>", " x", ""]
    with pytest.raises(ValueError, match="add_tokens: ") as error:
        load_model(bases["rows"], add_tokens=tokens)
    for part in (
        "'<tool>' is given twice",
        "'sky' is a token already, 12; train its row by lora.tokens",
        "' x' must not be blank, nor start or end with a space",
        "'' must not be blank",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_new_tokens_need_a_decoder_with_a_tokenizer(name):
    match = "has no tokenizer.json" if name == "llama" else "only a decoder with one"
    with pytest.raises(ValueError, match=match):
        load_model(HERE / name, add_tokens=NEW)
