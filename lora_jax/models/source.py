"""Where a model's config and tensors come from: a folder or a GGUF file."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files.fetch import find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader, first_part
from lora_jax.files.json_file import read_json
from lora_jax.files.safetensors import open_tensors
from lora_jax.files.special_tokens import MODEL_CONFIG
from lora_jax.models.families import FAMILIES
from lora_jax.models.family import Family
from lora_jax.names import EMBED, EMBEDDING, LM_HEAD
from lora_jax.tree.paths import nearest

TIED_HEAD = f"{LM_HEAD}.weight"  # a file may repeat the embedding under this name

# Ends of the names of transformers' classes: a model without a head, and models whose
# head is neither of the two kinds here (a decoder's predicts tokens).
_BARE = re.compile(r"((?<!LMHead)(?<!DoubleHeads)Model|Backbone)$")
_OTHER_HEAD = re.compile(r"(ForTokenClassification|ForQuestionAnswering|Choice)$")
_DECODER_HEAD = re.compile(rf"{_OTHER_HEAD.pattern}|Classification$|DoubleHeadsModel$")


class Source(NamedTuple):
    """A model on disk, not loaded yet.

    Attributes:
      path: the folder or file.
      settings: the content of its ``config.json``.
      family: the family of its model type.
      tensors: a reader of its tensors, by their names in the file.
      names: the file's name of each tensor, by its bare name.
    """

    path: Path
    settings: dict[str, Any]
    family: Family
    tensors: Any
    names: dict[str, str]

    @property
    def config(self) -> Any:
        """What the family reads from the settings: the module's config."""
        config = read_config(self.family, self.settings, self.path)
        if self.family.is_tower and TIED_HEAD not in self.names:
            # Two places may say whether it is tied; transformers goes by the file too.
            return dataclasses.replace(config, is_tied=True)
        return config

    @property
    def architecture(self) -> str:
        """The class of transformers that ``config.json`` names; empty if it doesn't."""
        names = self.settings.get("architectures")
        first = names[0] if isinstance(names, list) and names else ""
        return first if isinstance(first, str) else ""

    @property
    def is_bare(self) -> bool:
        """Whether transformers opens it without a head, and names have no prefix."""
        return not self.architecture or bool(_BARE.search(self.architecture))

    @property
    def has_other_head(self) -> bool:
        """Whether its head is of a kind that this library doesn't have."""
        other = _OTHER_HEAD if self.family.head else _DECODER_HEAD
        return bool(other.search(self.architecture))

    def with_own_head(self) -> "Source":
        """The same with the embedding's tensor as the head's too."""
        names = dict(self.names)
        if embed := names.get(self.family.tensor_name(f"{EMBED}/{EMBEDDING}")):
            names[TIED_HEAD] = embed
        return self._replace(names=names)

    def pieces(self, bare: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor by its bare name; yields where a piece belongs, and it."""
        return self.tensors.pieces(self.names[bare])

    def shape(self, bare: str) -> tuple[int, ...]:
        """The shape of a tensor in the file."""
        return self.tensors.shapes[self.names[bare]]

    def dtype(self, bare: str) -> np.dtype[Any]:
        """The dtype that a tensor has when it is read."""
        return next(self.pieces(bare))[1].dtype


def open_source(path: str | os.PathLike[str]) -> Source:
    """Finds a model, fetching it where it isn't on this machine, and reads its config.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a GGUF file, one of
        these in an installed Python package (``"package:NAME/path"``), or a hub id.

    Returns:
      The model's source.

    Raises:
      FileNotFoundError: if there is no model, or no weights.
      ValueError: if a file is damaged or the model type unknown.
    """
    found = find_model(path)
    if found.suffix == SUFFIX:
        found = first_part(found)
        tensors = GGUFReader(found)
        settings = check_settings(tensors.config, found)
    else:
        settings = read_settings(found)
        tensors = open_tensors(found)
    family = FAMILIES[settings["model_type"]]
    names = _bare_names(tensors.shapes, family, found)
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
    path = Path(folder) / MODEL_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a Hugging Face model folder; it has no {MODEL_CONFIG}."
        )
    return check_settings(read_json(path), path)


def read_config(family: Family, settings: dict[str, Any], path: Path) -> Any:
    """Reads a module's config.

    Args:
      family: of the model.
      settings: what its ``config.json`` or GGUF file holds.
      path: the folder or the file, for errors.

    Returns:
      The config.

    Raises:
      ValueError: if it doesn't fit, or is of an unsupported variant; names the file.
    """
    try:
        return family.read_config(settings)
    except ValueError as error:
        file, text = path / MODEL_CONFIG if path.is_dir() else path, str(error)
        own = text.removeprefix(f"{MODEL_CONFIG} ")
        between = ": " if own == text else " "
        raise ValueError(f"{file}{between}{own}") from error


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
        hint = ""
        if isinstance(found, str) and found:
            hint = f" Did you mean: {nearest(found, FAMILIES)}?"
        raise ValueError(
            f"{path}: model_type must be one of {sorted(FAMILIES)}; got {found!r}."
            f"{hint} Other models can be built in Flax and adapted with `adapt`."
        )
    return settings


def _bare_names(tensors: Iterable[str], family: Family, path: Path) -> dict[str, str]:
    """Returns the file's name of each tensor by its bare name, `Family.bare_name`."""
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
