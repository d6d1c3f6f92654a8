"""Images against what transformers' processors make of them, and bad ones."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from lora_jax.files.images import load_processor
from tests.models.golden import GOLDEN

IMAGES = GOLDEN / "images"


@pytest.mark.parametrize("image", ["colour", "grey", "turned"])
@pytest.mark.parametrize("kind", ["vit", "bit"])
def test_pixels_are_those_of_transformers(kind, image):
    want = np.load(IMAGES / "reference.npz", allow_pickle=False)[f"{kind}_{image}"]
    got = load_processor(IMAGES / kind).read(IMAGES / f"{image}.png")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def folder(tmp_path):
    """Writes a processor's settings: the golden one's with changes."""

    def write(kind, **changes):
        file = IMAGES / kind / "preprocessor_config.json"
        settings = json.loads(file.read_text()) | changes
        (tmp_path / file.name).write_text(json.dumps(settings))
        return tmp_path

    return write


def test_absent_keys_have_the_defaults_of_transformers(tmp_path):
    for kind in ("ViTImageProcessor", "BitImageProcessorFast"):
        settings = {"image_processor_type": kind}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        processor = load_processor(tmp_path)
        is_vit = kind.startswith("ViT")
        assert processor.size == ((224, 224) if is_vit else 224)
        assert processor.crop == (None if is_vit else (224, 224))
        assert processor.resample == (2 if is_vit else 3)
        assert processor.factor == 1 / 255


def test_steps_can_be_left_out_and_an_old_size_is_a_square(folder):
    plain = folder("vit", do_rescale=False, do_normalize=False, size=5)
    pixels = load_processor(plain).read(IMAGES / "colour.png")
    assert pixels.shape == (3, 5, 5)
    np.testing.assert_array_equal(pixels, np.round(pixels))
    as_is = load_processor(folder("vit", do_resize=False)).read(IMAGES / "colour.png")
    assert as_is.shape == (3, 25, 30)


def test_what_is_not_supported_is_named_at_once(folder):
    with pytest.raises(ValueError, match="do_pad must be false here") as error:
        load_processor(
            folder(
                "bit",
                do_pad=True,
                do_resize="yes",
                resample=9,
                rescale_factor=0,
                image_std=[1, 0, 1],
                crop_size={"height": 0, "width": 3},
            )
        )
    for text in (
        "do_resize must be true or false; got 'yes'",
        "resample must be one of Pillow's filters 0 to 5; got 9",
        "rescale_factor must be a number above 0; got 0",
        "image_std must be 3 numbers, one per channel; got [1, 0, 1]",
        "crop_size must have height and width",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="size must have height and width"):
        load_processor(folder("bit", size=224))
    with pytest.raises(ValueError, match=r"image_processor_type must .*'Sam'"):
        load_processor(folder("vit", image_processor_type="Sam"))


def test_a_folder_without_a_usable_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"use 'pixel_values' instead"):
        load_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load_processor(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        load_processor(tmp_path)


def test_files_that_are_no_images_are_named(tmp_path, folder):
    processor = load_processor(IMAGES / "bit")
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        processor.read(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png must be an image"):
        processor.read(text)
    cut = tmp_path / "cut.png"
    shutil.copyfile(IMAGES / "colour.png", cut)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png must be an image"):
        processor.read(cut)
    small = tmp_path / "small.png"
    PIL.Image.new("RGB", (4, 13)).save(small)
    as_is = load_processor(folder("bit", do_resize=False))
    with pytest.raises(ValueError, match=r"at least 12 x 14 pixels.* it has 13 x 4"):
        as_is.read(small)


def write_png(path, size=(30, 20)):
    PIL.Image.new("RGB", size, (9, 99, 200)).save(path, "PNG")
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": {}}, "image_processor_type must be one of"),
        ({"resample": 2.0}, "resample must be one of Pillow's filters"),
        ({"size": {"height": 10**400, "width": 2}}, "size must have height"),
        (
            {"size": {"height": 1 << 24, "width": 2}},
            "resized, must have at most 16",
        ),
        ({"rescale_factor": 10**400}, "rescale_factor must be a number above 0"),
        ({"rescale_factor": 1e30, "image_std": [1e-30] * 3}, "must have finite pixels"),
    ],
)
def test_settings_that_would_fill_memory_or_float32_are_refused(
    settings, message, tmp_path
):
    kept = {"image_processor_type": "ViTImageProcessor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    image = write_png(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        load_processor(tmp_path).read(image)


def test_a_long_thin_image_is_not_resized_to_gigabytes(tmp_path):
    kept = {"image_processor_type": "BitImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    image = write_png(tmp_path / "a.png", (100_000, 1))
    with pytest.raises(ValueError, match=r"resized, must have .* got 224 x 22400000"):
        load_processor(tmp_path).read(image)


@pytest.mark.parametrize("name", ["a.eps", "a.jp2"])
def test_a_format_that_needs_other_programs_or_gigabytes_is_refused(name, tmp_path):
    kept = {"image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} must be an image \(JPEG, PNG"):
        load_processor(tmp_path).read(tmp_path / name)
