"""Reading a GGUF file's header, with every count checked against the file's size.

The `gguf` package's own reader trusts the counts in a file: with a truncated or
malicious one it loops and allocates without bound, and a vocabulary takes it seconds.
So the header (metadata and tensor table) is read here; the package only dequantises.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
MIN_FIELD = 13  # bytes: an empty key, a type and a byte
MIN_TENSOR = 24  # bytes: an empty name, no dimensions, a type and an offset


class StoredTensor(NamedTuple):
    """A tensor in the file.

    Attributes:
      shape: outermost axis first, unlike in the file.
      kind: number of its ggml storage type.
      offset: offset of its first byte in the file.
      size: size in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


class Header(NamedTuple):
    """A file's header.

    Attributes:
      metadata: values by key; arrays of numbers are NumPy's, of strings lists.
      tensors: the location of each tensor, by the file's own names.
      data: the whole file as memory-mapped bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    data: np.ndarray


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> Header:
    """Reads the header of a GGUF file; maps its data without reading it.

    Args:
      path: the file.
      block_sizes: from a storage type's number to (elements, bytes) of its blocks.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a GGUF file, or a count or offset in it is impossible.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a GGUF file; there is no file.")
    size = os.path.getsize(path)
    try:
        if size < len(MAGIC):
            raise ValueError("it is too short for a header")
        cursor = _Cursor(np.memmap(path, np.uint8, "r"))
        metadata, tensors = _read(cursor, block_sizes)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} ({size} bytes) must be a complete GGUF file; {error}. It is "
            "probably truncated or another format: copy or download it again."
        ) from error
    return Header(metadata, tensors, cursor.data)


def _read(
    cursor: "_Cursor", block_sizes: dict[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if cursor.take(4, "the magic number") != MAGIC:
        raise ValueError("it doesn't begin with 'GGUF'")
    version = cursor.number("<u4", "the version")
    if version not in VERSIONS:
        raise ValueError(
            f"its version must be one of {VERSIONS}, little-endian; got {version}"
        )
    tensor_count = cursor.count(MIN_TENSOR, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(MIN_FIELD, "metadata fields")):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise ValueError(f"metadata {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<u4", key), key)
    table = {}
    for _ in range(tensor_count):
        name = cursor.text("a tensor's name")
        if name in table:
            raise ValueError(f"tensor {name!r} appears twice")
        table[name] = cursor.tensor(name, block_sizes)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= cursor.data.size:
        raise ValueError(f"general.alignment must be in the file; got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {n: t._replace(offset=start + t.offset) for n, t in table.items()}
    outside = [n for n, t in tensors.items() if t.offset + t.size > cursor.data.size]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(tensors)} tensors end after the file's end, e.g. "
            f"{outside[0]!r}"
        )
    return metadata, tensors


class _Cursor:
    """A position in the file that moves forward, but never past its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.view, self.at = data, data.data, 0

    def take(self, size: int, what: str) -> bytes:
        if size > self.data.size - self.at:
            raise ValueError(
                f"{what[:80]} needs {size} bytes at byte {self.at} and "
                f"{self.data.size - self.at} are left"
            )
        self.at += size
        return bytes(self.view[self.at - size : self.at])

    def number(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def count(self, least: int, what: str) -> int:
        """Reads the number of items, which take at least ``least`` bytes each."""
        count = self.number("<u8", f"the number of {what}")
        if count * least > self.data.size - self.at:
            raise ValueError(
                f"{count} {what[:80]} can't fit in the {self.data.size - self.at} "
                f"bytes that are left at byte {self.at}"
            )
        return count

    def text(self, what: str) -> str:
        if self.at + 8 > self.data.size:
            raise ValueError(f"{what[:80]} is cut off at byte {self.at}")
        (size,) = struct.unpack_from("<Q", self.view, self.at)  # fast, for vocabularies
        self.at += 8
        return self.take(size, what).decode("utf-8")

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self._array(self.number("<u4", what), what)
        return self.number(_scalar(kind, what), what)

    def _array(self, kind: int, what: str) -> Any:
        if kind == STRING:
            count = self.count(8, f"strings of {what}")
            return [self.text(what) for _ in range(count)]
        dtype = np.dtype(_scalar(kind, what))
        count = self.count(dtype.itemsize, f"numbers of {what}")
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def tensor(self, name: str, block_sizes: dict[int, tuple[int, int]]):
        dims = self.number("<u4", name)
        if dims > MAX_DIMS:
            raise ValueError(
                f"tensor {name[:80]!r} must have at most {MAX_DIMS} axes; got {dims}"
            )
        shape = tuple(self.number("<u8", name) for _ in range(dims))[::-1]
        kind, offset = self.number("<u4", name), self.number("<u8", name)
        if 0 in shape:
            raise ValueError(f"tensor {name[:80]!r} has no elements: {shape}")
        if kind not in block_sizes:
            raise ValueError(f"tensor {name[:80]!r} has the unknown type {kind}")
        elements, size = block_sizes[kind]
        if (shape[-1] if shape else 1) % elements:
            raise ValueError(
                f"the rows of tensor {name[:80]!r} of shape {shape} must be blocks of "
                f"{elements}"
            )
        return StoredTensor(shape, kind, offset, math.prod(shape) // elements * size)


def _scalar(kind: int, what: str) -> str:
    if kind not in SCALARS:
        raise ValueError(f"{what[:80]} has the unknown or nested type {kind}")
    return SCALARS[kind]
