"""Configs that change what a model computes: transformers' logits under them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop.pretrained import load_model
from lora_jax.models.generate import generate
from tests.golden.make_exports import inputs
from tests.models.golden import GOLDEN

VARIANTS = GOLDEN / "variants"
SHORT = 6
GENERATED = ("gpt2_layers", "phi3_longrope")
BASES = dict(zip(GENERATED, ("gpt2", "phi3"), strict=True)) | {"olmoe_clip": "olmoe"}


def folder(name, target):
    target.mkdir()
    shutil.copy(VARIANTS / f"{name}.json", target / "config.json")
    shutil.copy(GOLDEN / BASES[name] / "model.safetensors", target)
    return target


def ids(name):
    return inputs(BASES[name])["input_ids"]


def wanted(name):
    with np.load(VARIANTS / "reference.npz") as reference:
        return reference[name]


def assert_close(found, reference):
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=6e-5)


@pytest.mark.parametrize(
    ("name", "scan"),
    [*((n, scan) for n in GENERATED for scan in (False, True)), ("olmoe_clip", True)],
)
def test_logits_are_those_of_transformers(name, scan, tmp_path):
    model = load_model(folder(name, tmp_path / "m"), scan_layers=scan)
    run = jax.jit(model.module.apply)
    assert_close(run(model.variables, ids(name)), wanted(name))
    short = ids(name)[:, :SHORT]
    assert_close(run(model.variables, short), wanted(f"{name}_short"))


def test_longrope_goes_by_the_positions_where_they_are_given(tmp_path):
    name = "phi3_longrope"
    model = load_model(folder(name, tmp_path / "m"))
    tokens = ids(name)[:, :SHORT]
    packed = np.concatenate([tokens, tokens], axis=1)  # 12 > 8, examples of 6
    positions = np.broadcast_to(np.arange(2 * SHORT) % SHORT, packed.shape)
    segments = np.broadcast_to(np.arange(2 * SHORT) // SHORT, packed.shape)
    given = (jnp.asarray(x) for x in (packed, positions, segments))
    found = jax.jit(model.module.apply)(model.variables, *given)
    assert_close(found[:, SHORT:], wanted(f"{name}_short"))


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize(("length", "new"), [(4, 5), (9, 3)], ids=["short", "long"])
def test_generation_continues_as_the_whole_text_is_read(name, length, new, tmp_path):
    model = load_model(folder(name, tmp_path / "m"))
    prompt = ids(name)[0, :length].tolist()
    (found,) = generate(model.module, model.variables, [prompt], max_new_tokens=new)
    text = np.array([prompt + found[:-1]])
    logits = jax.jit(model.module.apply)(model.variables, text)
    assert logits[0, length - 1 :].argmax(-1).tolist() == found


def test_a_cache_is_not_continued_beyond_longropes_original_context(tmp_path):
    model = load_model(folder("phi3_longrope", tmp_path / "m"))
    with pytest.raises(ValueError, match="at most 5 for a prompt of 4 tokens; got 6"):
        generate(model.module, model.variables, [[1, 2, 3, 4]], max_new_tokens=6)
