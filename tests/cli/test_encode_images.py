"""`lora-jax encode` on models of images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.models.golden import GOLDEN

IMAGES = GOLDEN / "images"
NAMES = ("vit", "dinov2")


@pytest.fixture
def encode(tmp_path, call):
    """Encodes lines; gives the exit code, the lines out and what was said."""

    def run(model, lines):
        data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ("--model", model, "--data", data, "--out", out, "--batch-size", 2)
        code, _, said = call("encode", *words)
        text = out.read_text() if out.exists() else ""
        return code, [json.loads(line) for line in text.splitlines()], said

    return run


@pytest.fixture
def vit(tmp_path):
    """A ViT with a processor for its images of 12 x 12, and images beside the data."""
    folder = Path(shutil.copytree(GOLDEN / "vit", tmp_path / "vit"))
    settings = json.loads((IMAGES / "vit" / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 12, "width": 12}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    for file in IMAGES.glob("*.png"):
        shutil.copyfile(file, tmp_path / file.name)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_pixels_give_the_logits_and_mean_of_transformers(name, encode):
    golden = np.load(GOLDEN / name / "reference.npz", allow_pickle=False)
    pixels = golden["pixel_values"].tolist()
    code, lines, _ = encode(GOLDEN / name, [{"pixel_values": x} for x in pixels])
    assert code == 0
    logits, embeddings = ([x[key] for x in lines] for key in ("logits", "embedding"))
    want = golden["last_hidden_state"].mean(axis=1)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(embeddings, want, rtol=1e-5, atol=2e-5)


def test_an_image_is_encoded_as_its_pixels_are(vit, encode):
    from lora_jax.files.images import load_processor

    pixels = load_processor(vit).read(IMAGES / "turned.png").tolist()
    lines = [{"image": "turned.png"}, {"image": "grey.png"}, {"pixel_values": pixels}]
    code, encoded, _ = encode(vit, lines)
    assert code == 0
    same, other, by_pixels = (np.array(line["embedding"]) for line in encoded)
    np.testing.assert_allclose(same, by_pixels, rtol=1e-5, atol=1e-6)
    assert np.abs(same - other).max() > 1e-2


def test_images_of_several_sizes_go_through_dinov2(encode):
    golden = np.load(GOLDEN / "dinov2" / "resized.npz", allow_pickle=False)
    rng = np.random.default_rng(0)
    lines = [
        {"pixel_values": rng.standard_normal((3, 8, 16)).tolist()},
        {"pixel_values": golden["pixel_values"][1].tolist()},
    ]
    code, encoded, _ = encode(GOLDEN / "dinov2", lines)
    assert code == 0
    got = encoded[1]["logits"]
    np.testing.assert_allclose(got, golden["logits"][1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": 3}, ":1: 'image' must be a path; got 3"),
        ({"image": "a", "pixel_values": []}, "either 'image' or 'pixel_values'"),
        (
            {"pixel_values": [[1.0], [1.0, 2.0]]},
            "must be [c][y][x] numbers, with rows of",
        ),
        ({"pixel_values": [[["a"]]]}, "must be [c][y][x] numbers; got shape [1, 1, 1]"),
        ({"pixel_values": [[[float("nan")]]]}, ":1: 'pixel_values' must be finite"),
        ({"pixel_values": [[[1.0]]]}, "3 channels and 12 x 12; got [1, 1, 1]"),
        ({"image": "none.png"}, "none.png"),
        ({"image": "in.jsonl"}, "in.jsonl must be an image"),
        ({"text": "a film"}, "example 1: the model reads images"),
    ],
)
def test_bad_lines_are_named(line, message, vit, encode):
    code, _, said = encode(vit, [line])
    assert code == 2
    assert message in said


def test_a_folder_without_a_processor_takes_pixels_only(tmp_path, encode):
    shutil.copyfile(IMAGES / "grey.png", tmp_path / "grey.png")
    code, _, said = encode(GOLDEN / "vit", [{"image": "grey.png"}])
    assert code == 2
    assert "has no preprocessor_config.json" in said


def test_a_decoder_is_no_encoder(encode):
    code, _, said = encode(GOLDEN / "llama", [{"input_ids": [1, 2]}])
    assert code == 2
    assert "must be a text or image encoder" in said
