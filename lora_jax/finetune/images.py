"""JSONL lines with images: validation, and batches of pixels."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.images import ImageProcessor, load_processor
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.lines import Batch, check_faults
from lora_jax.models.encoder_config import ImageEncoderConfig

IMAGE, PIXELS = "image", "pixel_values"


def is_image(record: Mapping[str, Any]) -> bool:
    """Returns whether a line contains an image."""
    return IMAGE in record or PIXELS in record


def image_fault(record: Mapping[str, Any]) -> str:
    """Returns an error message for a line with an image; empty if it is valid."""
    if IMAGE in record and PIXELS in record:
        return f"must have either {IMAGE!r} or {PIXELS!r}"
    if IMAGE in record:
        path = record[IMAGE]
        is_path = isinstance(path, str) and path
        return "" if is_path else f"{IMAGE!r} must be a path; got {path!r}"[:200]
    try:
        pixels = np.asarray(record[PIXELS])
    except ValueError:
        return f"{PIXELS!r} must be [c][y][x] numbers, with rows of equal length"
    if pixels.ndim != 3 or pixels.dtype.kind not in "iuf":
        return f"{PIXELS!r} must be [c][y][x] numbers; got shape {list(pixels.shape)}"
    return "" if np.isfinite(pixels).all() else f"{PIXELS!r} must be finite"


def image_batches(
    config: ImageEncoderConfig,
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    rows: int,
    data: str,
) -> Iterator[Batch]:
    """Yields batches of images of the same size.

    Args:
      config: the model's config.
      folder: the model's folder, with its ``preprocessor_config.json``.
      records: the lines; paths are relative to the folder of the data file.
      rows: images per batch; smaller batches are padded with zeros.
      data: the data file.

    Yields:
      Indices of lines and their pixels ``[rows, c, y, x]``.

    Raises:
      UserError: if files are missing (all are listed, before the first batch), or an
        image can't be read or has the wrong shape for the model.
    """
    home = Path(data).parent
    missing = [
        f"{data}: example {number}: no image at {home / record[IMAGE]}"
        for number, record in enumerate(records, start=1)
        if IMAGE in record and not (home / record[IMAGE]).is_file()
    ]
    check_faults("missing images", missing)
    has_files = any(IMAGE in record for record in records)
    processor = load_processor(folder) if has_files else None
    for start in range(0, len(records), rows):
        by_shape: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for i in range(start, min(start + rows, len(records))):
            try:
                pixels = _read(config, processor, home, records[i])
            except ValueError as error:
                raise UserError(f"{data}: example {i + 1}: {error}") from error
            by_shape.setdefault(pixels.shape, []).append((i, pixels))
        for shape, images in by_shape.items():
            batch = np.zeros((rows, *shape), np.float32)
            batch[: len(images)] = [pixels for _, pixels in images]
            yield np.array([i for i, _ in images]), (batch,)


def _read(
    config: ImageEncoderConfig,
    processor: ImageProcessor | None,
    home: Path,
    record: Mapping[str, Any],
) -> np.ndarray:
    """Returns the pixels ``[c, y, x]`` of one line."""
    if processor is not None and IMAGE in record:
        pixels = processor.read(home / record[IMAGE])
    else:
        pixels = np.asarray(record[PIXELS], np.float32)
    channels, *size = pixels.shape
    own = [config.image_height, config.image_width]
    fits = 0 not in config.grid(*size) if config.is_resizable else size == own
    if channels != config.num_channels or not fits:
        wanted = "one patch or more" if config.is_resizable else f"{own[0]} x {own[1]}"
        raise ValueError(
            f"the model needs images of {config.num_channels} channels and {wanted}; "
            f"got {list(pixels.shape)}"
        )
    return pixels
