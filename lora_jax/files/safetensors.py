"""Safetensors files, read one tensor at a time and written atomically.

Files are memory-mapped, so a model needs no more memory than its own size plus a piece
of one tensor. Nothing is unpickled.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.atomic import new_file
from lora_jax.files.json_file import read_json
from lora_jax.files.optional import load_optional

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 2**20  # numbers read at once
LONGEST_FILE = 255  # characters of a file name
LONGEST_NAME = 1000  # characters of a tensor's name; real ones have under 100


def _safetensors() -> Any:
    purpose = "reading and writing weights"
    return load_optional(purpose, "safetensors", "safetensors.numpy")


class TensorReader:
    """The tensors of one or several safetensors files, by name.

    Attributes:
      files: the files, in order.
      shapes: tensor shapes by name, from the headers.
    """

    def __init__(self, files: list[Path]):
        library = _safetensors()
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for file in files:
            try:
                handle = library.safe_open(file, framework="np")
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if len(name) > LONGEST_NAME:
                        raise ValueError(
                            f"{file}: tensor names must have at most {LONGEST_NAME} "
                            f"characters; {name[:40]!r}... has {len(name)}."
                        )
                    if name in self.shapes:
                        raise ValueError(
                            f"{file}: tensor {name!r} must be in one shard only; it is "
                            f"also in {owners[name]}."
                        )
                    owners[name] = file.name
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                    self._handles[name] = handle
            except library.SafetensorError as error:
                raise ValueError(
                    f"{file} ({file.stat().st_size} bytes) must be a safetensors file; "
                    f"it can't be read: {error}. It is probably truncated: copy or "
                    "download it again."
                ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory."""
        return self._read(name, self._handle(name).get_tensor, name)

    def pieces(self, name: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor some rows at a time.

        Yields:
          The index of a piece in the tensor, and the piece: about `PIECE` numbers, or
          one row.
        """
        handle, shape = self._handle(name), self.shapes[name]
        if math.prod(shape) <= PIECE:
            yield ..., self[name]
            return
        step = max(1, PIECE // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            part = handle.get_slice(name)
            yield rows, self._read(name, part.__getitem__, rows)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Reads some rows of one tensor."""
        part = self._handle(name).get_slice(name)
        return self._read(name, part.__getitem__, rows)

    def _read(self, name: str, get: Callable[[Any], np.ndarray], what: Any) -> Any:
        try:
            return get(what)
        except AttributeError as error:  # the package looks its dtype up in NumPy
            kind = self._handles[name].get_slice(name).get_dtype()
            raise ValueError(
                f"tensor {name!r} of {', '.join(map(str, self.files))} must have a "
                f"NumPy dtype or bfloat16; got {kind}. Convert quantised models to "
                "bfloat16 or float32 first."
            ) from error

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            raise ValueError(
                f"tensor {name!r} must be one of the {len(self.shapes)} in "
                f"{', '.join(map(str, self.files))}."
            )
        return self._handles[name]


def open_tensors(path: str | os.PathLike[str]) -> TensorReader:
    """Opens a safetensors file, or the model in a Hugging Face folder.

    Args:
      path: a ``.safetensors`` file, or a folder with ``model.safetensors`` or with
        ``model.safetensors.index.json`` and its shards.

    Returns:
      A reader; no tensors have been read.

    Raises:
      FileNotFoundError: if there is no such file, or a shard is missing.
      ValueError: if a file is damaged, or an index points outside its folder.
    """
    path = Path(path)
    if path.is_file():
        return TensorReader([path])
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} must be a safetensors file or a model folder; there is neither."
        )
    if (path / INDEX).is_file():
        return TensorReader(_shards(path))
    if (path / SINGLE).is_file():
        return TensorReader([path / SINGLE])
    found = sorted(p.name for p in path.iterdir())
    raise FileNotFoundError(
        f"{path} must contain {SINGLE} or {INDEX}; it has {found}. Pickled weights "
        "(.bin, .pt) are not supported: save the model with safetensors."
    )


def _shards(folder: Path) -> list[Path]:
    """Returns the files of a sharded model's index, each inside the folder."""
    index = read_json(folder / INDEX)
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / INDEX} must be JSON with a weight_map from tensor names to "
            f"file names; it can't be parsed: {error!r}."
        ) from error
    if outside := [n for n in names if not _is_file_name(n)]:
        got = repr(outside)[:200]
        raise ValueError(
            f"{folder / INDEX} must name files in its own folder; got {got}."
        )
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise FileNotFoundError(
            f"{folder} must contain the {len(names)} shards of {INDEX}; missing: "
            f"{', '.join(missing)}. Download the folder again."
        )
    return [folder / n for n in names]


def _is_file_name(name: Any) -> bool:
    is_text = isinstance(name, str) and 0 < len(name) <= LONGEST_FILE
    return is_text and Path(name).name == name and name != ".."


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a safetensors file atomically.

    Args:
      path: the file to write.
      tensors: NumPy or JAX arrays by name.
      metadata: strings for the header.

    Returns:
      The size of the file in bytes.

    Raises:
      OSError: if it can't be written; an existing file is left as it was.
    """
    library, path = _safetensors(), Path(path)
    arrays = {name: np.asarray(t, order="C") for name, t in tensors.items()}
    try:
        with new_file(path) as new:
            library.numpy.save_file(arrays, new, metadata=dict(metadata or {}))
    except (OSError, library.SafetensorError) as error:
        size = sum(a.nbytes for a in arrays.values())
        raise OSError(
            f"{path} ({size} bytes) can't be written: {error}. Free some disk space or "
            "choose another folder; an existing file was not changed."
        ) from error
    return path.stat().st_size
