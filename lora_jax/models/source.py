"""Where a model's config and tensors come from: a folder or a GGUF file."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files.fetch import find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader
from lora_jax.files.json_file import read_json
from lora_jax.files.safetensors import open_tensors
from lora_jax.models.families import FAMILIES
from lora_jax.models.family import Family

CONFIG = "config.json"


class Source(NamedTuple):
    """A model on disk, nothing of it in memory yet.

    Attributes:
      path: the folder or file.
      settings: what its ``config.json`` holds.
      family: of its model type.
      tensors: by their names in the file, read on access; with ``shapes``.
      names: the file's name of each tensor, by its bare name.
    """

    path: Path
    settings: dict[str, Any]
    family: Family
    tensors: Any
    names: dict[str, str]

    def pieces(self, bare: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor by its bare name; yields where a piece belongs, and it."""
        return self.tensors.pieces(self.names[bare])

    def shape(self, bare: str) -> tuple[int, ...]:
        """The shape of a tensor in the file."""
        return self.tensors.shapes[self.names[bare]]

    def dtype(self, bare: str) -> np.dtype[Any]:
        """The dtype that a tensor is read in."""
        return next(self.pieces(bare))[1].dtype


def open_source(path: str | os.PathLike[str]) -> Source:
    """Finds a model, fetching it where it isn't on this machine, and reads its config.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a GGUF file, one of
        these in an installed Python package (``"package:NAME/path"``), or a hub id.

    Returns:
      The model's source.

    Raises:
      FileNotFoundError: if there is nothing there, or no weights.
      ValueError: if a file is damaged or the model type unknown.
    """
    found = find_model(path)
    if found.suffix == SUFFIX:
        tensors = GGUFReader(found)
        settings = check_settings(tensors.config, found)
    else:
        settings = read_settings(found)
        tensors = open_tensors(found)
    family = FAMILIES[settings["model_type"]]
    names = bare_names(tensors.shapes, family, found)
    return Source(found, settings, family, tensors, names)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a model folder's ``config.json`` and checks its ``model_type``.

    Args:
      folder: the model folder.

    Returns:
      The parsed file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't a JSON object, or of an unknown model type.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a Hugging Face model folder; it has no {CONFIG}."
        )
    return check_settings(read_json(path), path)


def check_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a config whose model type is known.

    Args:
      settings: the object that the file holds.
      path: the file, for the error.

    Returns:
      ``settings``.

    Raises:
      ValueError: if the model type is unknown.
    """
    found = settings.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        raise ValueError(
            f"{path}: model_type must be one of {sorted(FAMILIES)}; got {found!r}. "
            "Other models can be built in Flax and adapted with `adapt`."
        )
    return settings


def bare_names(tensors: Iterable[str], family: Family, path: Path) -> dict[str, str]:
    """Maps bare tensor names, `Family.bare_name`'s, to a file's own.

    Args:
      tensors: the file's names.
      family: the model's family.
      path: the file or folder, for the error.

    Returns:
      The file's name of each tensor, by its bare name.

    Raises:
      ValueError: if two tensors have one bare name.
    """
    names: dict[str, str] = {}
    faults = []
    for name in sorted(tensors):
        bare = family.bare_name(name)
        if bare in names:
            faults.append(f"twice: {names[bare]} and {name}")
        names[bare] = name
    if faults:
        raise ValueError(
            f"{path} must hold each tensor once; it has {'; '.join(faults)}."
        )
    return names
