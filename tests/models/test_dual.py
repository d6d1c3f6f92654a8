"""CLIP and SigLIP: images and texts, against transformers; their embeddings, lines."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.finetune.encode import encode
from lora_jax.finetune.errors import UserError
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.load import load_base
from lora_jax.models.save import save_model
from lora_jax.train.embedding import embedding_loss
from tests.models.golden import GOLDEN

NAMES = ("clip", "siglip")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
by_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def models():
    return {name: load_base(GOLDEN / name) for name in NAMES}


def read(name):
    return dict(np.load(GOLDEN / name / "reference.npz", allow_pickle=False))


@by_name
def test_hidden_states_embeddings_and_logits_are_those_of_transformers(name, models):
    loaded, golden = models[name], read(name)
    ids, mask, pixels = (
        jnp.asarray(golden[k]) for k in ("input_ids", "attention_mask", "pixel_values")
    )

    def everything(module, ids, mask, pixels):
        return {
            "vision_hidden": module.vision(pixels),
            "text_hidden": module.text(ids, mask),
            "image_embeds": module.embed_image(pixels),
            "text_embeds": module.embed(ids, mask),
            "logits": module(ids, mask, pixels),
        }

    found = jax.jit(
        lambda v: loaded.module.apply(v, ids, mask, pixels, method=everything)
    )
    for key, array in found(loaded.variables).items():
        own, want = np.asarray(array), golden[key]
        if key == "text_hidden":
            own, want = own[np.asarray(mask) == 1], want[np.asarray(mask) == 1]
        np.testing.assert_allclose(own, want, err_msg=key, **TOLERANCE)


@by_name
def test_lines_of_texts_or_images_have_one_embedding_each(name, models):
    loaded, golden = models[name], read(name)
    lengths = golden["attention_mask"].sum(axis=1)
    if name == "siglip":  # padded here as it was trained
        lengths = np.full(3, 13)
        shorter = golden["input_ids"][2].tolist()
        ids = [*shorter[:5], *[loaded.config.padding_id] * 8]
        mask = jnp.ones((1, 13), int)
        want = jax.jit(
            lambda v: loaded.module.apply(v, jnp.array([ids]), mask, method="embed")
        )
        (line,) = encode(loaded, [{"input_ids": shorter[:5]}], "d").lines
        np.testing.assert_allclose(
            line["embedding"], want(loaded.variables)[0], **TOLERANCE
        )
    texts = [
        {"input_ids": row[:n].tolist()}
        for row, n in zip(golden["input_ids"], lengths, strict=True)
    ]
    images = [{"pixel_values": image.tolist()} for image in golden["pixel_values"]]
    for lines, key in ((texts, "text_embeds"), (images, "image_embeds")):
        found = encode(loaded, lines, "data.jsonl", batch_size=2).lines
        got = np.array([line["embedding"] for line in found])
        np.testing.assert_allclose(got, golden[key], **TOLERANCE)
    with pytest.raises(UserError, match="example 2: the model reads text, as in the"):
        encode(loaded, [texts[0], images[0]], "data.jsonl")


def test_both_encoders_are_adapted_and_learn_from_pairs():
    lora = LoRAConfig(rank=2, alpha=3, targets=["q_proj", "v_proj", "out_proj", "fc1"])
    loaded = load_model(GOLDEN / "siglip", lora=lora, key=jax.random.key(0))
    paths = {t.path for t in loaded.module.targets(loaded.params)}
    inside = {p for p in paths if "layer_" in p}
    assert len(inside) == 2 * 2 * 4
    assert paths - inside == {"vision_head/output", "vision_head/up"}
    linears = LoRAConfig(rank=2, targets="all-linear")
    every = load_model(GOLDEN / "siglip", lora=linears, key=jax.random.key(0))
    other = {
        t.path for t in every.module.targets(every.params) if "layer_" not in t.path
    }
    assert other == {"vision_head/up", "vision_head/down", "text_head"}

    golden = read("siglip")
    ids, mask = (jnp.asarray(golden[k][:2]) for k in ("input_ids", "attention_mask"))
    pixels = jnp.asarray(golden["pixel_values"])

    pairs = embedding_loss(loaded.module, method=("embed_image", "embed"))
    batch = {"queries": (pixels,), "keys": (ids, mask)}

    @jax.jit
    def gradients(lora, frozen):
        def loss(lora):
            variables = {"frozen": frozen, "lora": lora}
            total, weight, _ = pairs(variables, batch, {})
            return total / weight

        return jax.grad(loss)(lora)

    found = gradients(loaded.variables["lora"], loaded.variables["frozen"])
    leaves = jax.tree.leaves_with_path(found)
    b = [leaf for path, leaf in leaves if "lora_b" in str(path)]
    assert len(b) == len(paths)
    assert all(jnp.abs(leaf).max() > 0 for leaf in b)


@by_name
def test_a_saved_model_has_the_tensors_of_the_folder(name, models, tmp_path):
    loaded = models[name]
    save_model(tmp_path / "out", loaded.params, GOLDEN / name)
    again = load_base(tmp_path / "out")
    assert again.module == loaded.module
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    with pytest.raises(
        ValueError, match="num_labels must be None for a model of images"
    ):
        load_base(GOLDEN / name, num_labels=3)


def test_what_does_not_fit_is_told_at_once():
    settings = json.loads((GOLDEN / "siglip" / "config.json").read_text())
    settings["vision_config"] |= {"vision_use_head": False, "num_attention_heads": "3"}
    settings["text_config"] |= {"projection_size": 20}
    with pytest.raises(ValueError, match="SigLIP model") as caught:
        FAMILIES["siglip"].read_config(settings)
    for message in (
        "vision_use_head must be True here; got False",
        "projection_size of text_config must be hidden_size of vision_config = 21; got",
        "num_attention_heads must be an integer; got '3'",
    ):
        assert message in str(caught.value)
    assert FAMILIES["clip"].read_config({}).text.num_heads == 8
    old = {"text_config_dict": {"hidden_size": 16}, "text_config": {"hidden_size": 24}}
    assert FAMILIES["clip"].read_config(old).text.hidden_size == 16


def test_images_are_prepared_as_for_clip(tmp_path):
    from lora_jax.files.images import load_processor

    for kind, want in (
        ("CLIP", (224, 3, (224, 224))),
        ("Siglip", ((224, 224), 3, None)),
    ):
        settings = {"image_processor_type": f"{kind}ImageProcessor"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        found = load_processor(tmp_path)
        assert (found.size, found.resample, found.crop) == want
    folder = Path(shutil.copytree(GOLDEN / "clip", tmp_path / "clip"))
    assert load_base(folder).config.end_id == 37
