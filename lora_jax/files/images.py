"""Image files, processed according to a model's ``preprocessor_config.json``.

The steps are those of transformers' image processors, in their order: resize and crop
with Pillow, rescale, normalise. Any other setting is an error, so that images are read
exactly as in training.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import MOST
from lora_jax.files.json_file import read_json

IMAGE_CONFIG = "preprocessor_config.json"
# What is read. Pillow knows more: some with the help of other programs, and JPEG 2000,
# whose header can ask for gigabytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "AVIF")
MAX_FILE_PIXELS = 89_478_485  # where Pillow begins to warn
MAX_PIXELS = 1 << 24  # of what is made of it

Size = tuple[int, int]  # height and width

# Defaults: the class attributes of transformers' processors.
_SHARED = {"do_resize": True, "do_rescale": True, "do_normalize": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {
        **_SHARED,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "Bit": {
        **_SHARED,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
_DEFAULTS["Siglip"] = {**_DEFAULTS["ViT"], "resample": 3}
_STEPS = {"do_center_crop", "do_convert_rgb", *_SHARED}
_SUFFIXES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
_KINDS = {kind + suffix: kind for kind in _DEFAULTS for suffix in _SUFFIXES}
_KINDS |= {"CLIP" + suffix: "Bit" for suffix in _SUFFIXES}  # the same
_KINDS |= {"ViTFeatureExtractor": "ViT", "CLIPFeatureExtractor": "Bit"}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Turns an image file into a model's input.

    Attributes:
      size: height and width to resize to, or the length of the shorter edge, or None.
      resample: Pillow's number of the resampling filter.
      crop: height and width of the centre crop, or None.
      factor: rescales the bytes.
      mean: the mean of each channel, subtracted after rescaling.
      std: the standard deviation of each channel.
    """

    size: Size | int | None
    resample: int
    crop: Size | None
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """Reads an image in one of `FORMATS`.

        Returns:
          RGB pixels ``[c, y, x]`` float32.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is not an image, damaged, smaller than the crop, over 89
            million pixels, or over 16 million once resized.
        """
        import PIL.Image
        import PIL.ImageOps

        if not Path(path).is_file():
            raise FileNotFoundError(f"no image at {path}.")
        PIL.Image.init()
        known = [kind for kind in FORMATS if kind in PIL.Image.OPEN]
        try:
            with PIL.Image.open(path, formats=known) as file:
                _check_pixels(file.height, file.width, "it must", MAX_FILE_PIXELS)
                image = PIL.ImageOps.exif_transpose(file).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # each format's reader raises what it likes
            raise ValueError(
                f"{path} must be an image ({', '.join(known)}); it can't be read: "
                f"{error}."
            ) from error
        if self.size is not None:
            height, width = self._resized(image.height, image.width)
            _check_pixels(height, width, f"{path}, resized, must", MAX_PIXELS)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:
            image = image.crop(self._box(image.height, image.width, path))
        _check_pixels(image.height, image.width, f"{path} must", MAX_PIXELS)
        mean, std = (np.array(x)[:, None, None] for x in (self.mean, self.std))
        with np.errstate(over="ignore", invalid="ignore"):
            pixels = np.asarray(image, np.float32).transpose(2, 0, 1) * self.factor
            pixels = ((pixels - mean) / std).astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError(
                f"{path} must have finite pixels; rescale_factor, image_mean and "
                f"image_std of {IMAGE_CONFIG} make others of it."
            )
        return pixels

    def _resized(self, height: int, width: int) -> Size:
        if not isinstance(self.size, int):
            return self.size or (height, width)
        shorter, longer = sorted((height, width))
        long = int(self.size * longer / shorter)
        return (self.size, long) if height <= width else (long, self.size)

    def _box(self, height: int, width: int, path: Any) -> tuple[int, int, int, int]:
        rows, columns = self.crop or (height, width)
        if rows > height or columns > width:
            raise ValueError(
                f"{path} must have at least {rows} x {columns} pixels, the crop; after "
                f"resizing it has {height} x {width}."
            )
        top, left = (height - rows) // 2, (width - columns) // 2
        return left, top, left + columns, top + rows


def _check_pixels(height: int, width: int, what: str, most: int) -> None:
    if height * width > most:
        raise ValueError(
            f"{what} have at most {most:,} pixels; got {height} x {width}."
        )


def load_processor(folder: str | os.PathLike[str]) -> ImageProcessor:
    """Reads a model folder's ``preprocessor_config.json``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't JSON, or has unsupported settings; lists all of them.
    """
    path = Path(folder) / IMAGE_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {IMAGE_CONFIG}, which defines how images are resized and "
            "normalised; use 'pixel_values' instead of 'image'."
        )
    settings = read_json(path)
    name = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(
            f"{path}: image_processor_type must be one of {sorted(_KINDS)}; got "
            f"{name!r}. Process the images elsewhere and use 'pixel_values'."
        )
    faults: list[str] = []
    processor = _read(_KINDS[name], settings, faults)
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}.")
    return processor


def _read(kind: str, given: Mapping[str, Any], faults: list[str]) -> ImageProcessor:
    """Reads the settings of a processor of one kind, collecting faults."""
    kept = {key: value for key, value in given.items() if value is not None}
    settings = {**_DEFAULTS[kind], **kept}
    for key in sorted(settings):
        if key.startswith("do_") and key not in _STEPS and settings[key] is not False:
            faults.append(f"{key} must be false here; got {settings[key]!r}")
        elif key in _STEPS and not isinstance(settings[key], bool):
            faults.append(f"{key} must be true or false; got {settings[key]!r}")
    resample = settings["resample"]
    if type(resample) is not int or resample not in range(6):
        faults.append(
            f"resample must be one of Pillow's filters 0 to 5; got {resample!r}"
        )
    factor = settings.get("rescale_factor", 1 / 255)
    if not _is_number(factor):
        faults.append(f"rescale_factor must be a number above 0; got {factor!r}")
    means, stds = [0.0] * 3, [1.0] * 3
    if settings["do_normalize"] is True:
        means = _read_channels(settings, "image_mean", faults)
        stds = _read_channels(settings, "image_std", faults)
    size, crop = None, None
    if settings["do_resize"] is True:
        size = _read_size(settings, "size", faults, is_square=kind != "Bit")
    if settings.get("do_center_crop") is True:
        crop = _read_size(settings, "crop_size", faults, is_square=True)
    return ImageProcessor(
        size=size,
        resample=resample,
        crop=crop if isinstance(crop, tuple) else None,
        factor=factor if settings["do_rescale"] else 1.0,
        mean=tuple(means),
        std=tuple(stds),
    )


def _read_size(
    settings: Mapping[str, Any], key: str, faults: list[str], *, is_square: bool
) -> Size | int:
    """Reads a size: height and width, or if allowed the shorter edge."""
    value: Any = settings.get(key)
    if is_square and _is_count(value):
        return value, value
    if isinstance(value, dict) and all(map(_is_count, value.values())):
        if value.keys() == {"height", "width"}:
            return value["height"], value["width"]
        if value.keys() == {"shortest_edge"} and key == "size":
            return value["shortest_edge"]
    faults.append(f"{key} must have height and width (or shortest_edge); got {value!r}")
    return 1, 1


def _read_channels(
    settings: Mapping[str, Any], key: str, faults: list[str]
) -> Sequence[float]:
    value, is_positive = settings[key], key == "image_std"
    if (
        isinstance(value, list)
        and [_is_number(x, is_positive=is_positive) for x in value] == [True] * 3
    ):
        return value
    faults.append(f"{key} must be 3 numbers, one per channel; got {value!r}")
    return [1.0] * 3


def _is_number(value: Any, *, is_positive: bool = True) -> bool:
    is_finite = type(value) in (int, float) and abs(value) <= MOST
    return is_finite and (value > 0 or not is_positive)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_PIXELS
