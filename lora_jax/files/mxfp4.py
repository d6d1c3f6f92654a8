"""MXFP4 weights, four bits a number, read as bfloat16; exact.

``NAME_blocks`` ``[e, out, in / 32, 16]`` holds two numbers a byte, the first in the low
bits; ``NAME_scales`` ``[e, out, in / 32]`` the exponents of two, plus 127, of blocks of
32 numbers. They are read as one tensor ``NAME`` ``[e, in, out]``.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block of 32 numbers
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)


class Mxfp4Reader:
    """A reader of tensors, some of which are MXFP4.

    Attributes:
      shapes: from each tensor's name to its shape, unpacked.

    Args:
      reader: of the files' own tensors.

    Raises:
      ValueError: if blocks have no scales or other shapes; lists all of them.
    """

    def __init__(self, reader: Any):
        self._reader, self.shapes, faults = reader, dict(reader.shapes), []
        self._packed: set[str] = set()
        for blocks, shape in reader.shapes.items():
            name = blocks.removesuffix(BLOCKS)
            if name == blocks:
                continue
            scales = reader.shapes.get(name + SCALES)
            if len(shape) != 4 or shape[-1] != BYTES or scales != shape[:-1]:
                faults.append(f"{name}: blocks {list(shape)}, scales {scales}")
                continue
            experts, outputs, groups, _ = shape
            del self.shapes[blocks], self.shapes[name + SCALES]
            self.shapes[name] = (experts, groups * 2 * BYTES, outputs)
            self._packed.add(name)
        if faults:
            raise ValueError(
                "MXFP4 blocks must be [experts, out, in / 32, 16] and have scales "
                f"[experts, out, in / 32]; got {'; '.join(faults)}."
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory."""
        if name not in self._packed:
            return self._reader[name]
        return np.concatenate([piece for _, piece in self.pieces(name)])

    def pieces(self, name: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads one tensor an expert, or some rows, at a time."""
        if name not in self._packed:
            yield from self._reader.pieces(name)
            return
        for i in range(self.shapes[name][0]):
            rows = slice(i, i + 1)
            blocks = self._reader.rows(name + BLOCKS, rows)
            yield rows, unpack(blocks, self._reader.rows(name + SCALES, rows))


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns ``[e, in, out]`` bfloat16.

    Args:
      blocks: ``[e, out, in / 32, 16]`` bytes.
      scales: ``[e, out, in / 32]`` bytes.

    Example:
      >>> blocks = np.full((1, 1, 1, 16), 0x2A, np.uint8)  # -1.0, then 1.0
      >>> unpack(blocks, np.array([[[128]]], np.uint8))[0, :2, 0].tolist()
      [-2.0, 2.0]
    """
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1)  # [e, out, g, 16, 2]
    numbers = VALUES[pairs].reshape(*blocks.shape[:-1], -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    numbers = numbers.reshape(*blocks.shape[:2], -1).astype(ml_dtypes.bfloat16)
    return numbers.swapaxes(1, 2)
