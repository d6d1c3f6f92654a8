"""Where a model's config and tensors come from: a folder or a GGUF file."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files.fetch import find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader, first_part
from lora_jax.files.json_file import read_json
from lora_jax.files.mxfp4 import Mxfp4Reader
from lora_jax.files.safetensors import open_tensors
from lora_jax.files.special_tokens import MODEL_CONFIG
from lora_jax.models.families import FAMILIES
from lora_jax.models.family import Family, architecture
from lora_jax.names import EMBED, EMBEDDING, LM_HEAD
from lora_jax.tree.paths import nearest

TIED_HEAD = f"{LM_HEAD}.weight"  # a file may repeat the embedding under this name

# Ends of transformers' class names: models without a head, and models whose head is
# neither of the two kinds here (a decoder's predicts tokens).
_BARE = re.compile(r"((?<!LMHead)(?<!DoubleHeads)Model|Backbone)$")
_OTHER_HEAD = re.compile(r"(ForTokenClassification|ForQuestionAnswering|Choice)$")
_DECODER_HEAD = re.compile(rf"{_OTHER_HEAD.pattern}|Classification$|DoubleHeadsModel$")


class Source(NamedTuple):
    """A model on disk, not loaded yet.

    Attributes:
      path: the folder or file.
      settings: the content of its ``config.json``.
      family: the family of its model type.
      tensors: reads its tensors by their names in the file.
      names: each tensor's name in the file, by bare name.
    """

    path: Path
    settings: dict[str, Any]
    family: Family
    tensors: Any
    names: dict[str, str]

    @property
    def config(self) -> Any:
        """The module's config, which the family reads from the settings."""
        config = read_config(self.family, self.settings, self.path)
        # Config keys may disagree; like transformers, go by the file.
        has_head, is_pair = TIED_HEAD in self.names, self.family.has_source
        if is_pair or (self.family.is_multimodal and not has_head):
            return dataclasses.replace(config, is_tied=not has_head)
        return config

    @property
    def architecture(self) -> str:
        """The transformers class that ``config.json`` names; empty if it doesn't."""
        return architecture(self.settings)

    @property
    def is_bare(self) -> bool:
        """Whether transformers opens it without a head, so names have no prefix."""
        return not self.architecture or bool(_BARE.search(self.architecture))

    @property
    def has_other_head(self) -> bool:
        """Whether it has a kind of head that this library doesn't support."""
        other = _OTHER_HEAD if self.family.head else _DECODER_HEAD
        return bool(other.search(self.architecture))

    def with_own_head(self) -> "Source":
        """Returns the same source with the embedding's tensor as the head's too."""
        names = dict(self.names)
        if embed := names.get(self.family.tensor_name(f"{EMBED}/{EMBEDDING}")):
            names[TIED_HEAD] = embed
        return self._replace(names=names)

    def pieces(self, bare: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor by bare name; yields pieces with their positions in it."""
        return self.tensors.pieces(self.names[bare])

    def shape(self, bare: str) -> tuple[int, ...]:
        """Returns the shape of a tensor in the file."""
        return self.tensors.shapes[self.names[bare]]

    def dtype(self, bare: str) -> np.dtype[Any]:
        """Returns the dtype that a tensor has when read."""
        return next(self.pieces(bare))[1].dtype


def open_source(path: str | os.PathLike[str]) -> Source:
    """Finds a model, fetching it if it isn't local, and reads its config.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a GGUF file, one of
        these in an installed Python package (``"package:NAME/path"``), or a hub id.

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
        if is_mxfp4(settings):
            tensors = Mxfp4Reader(tensors)
    family = FAMILIES[settings["model_type"]]
    names = _bare_names(tensors.shapes, family, found)
    family = family.as_stored(names)
    return Source(found, settings, family, tensors, names)


def is_mxfp4(settings: Mapping[str, Any]) -> bool:
    """Returns whether a config says that experts are stored in four bits (gpt-oss)."""
    how = settings.get("quantization_config")
    return isinstance(how, dict) and how.get("quant_method") == "mxfp4"


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a model folder's ``config.json`` and checks its ``model_type``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't a JSON object, or the model type is unknown.
    """
    path = Path(folder) / MODEL_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a Hugging Face model folder; it has no {MODEL_CONFIG}."
        )
    return check_settings(read_json(path), path)


def read_config(family: Family, settings: dict[str, Any], path: Path) -> Any:
    """Reads a module's config from ``settings``; errors name the file at ``path``.

    Raises:
      ValueError: if it doesn't fit the family, or is of an unsupported variant.
    """
    try:
        return family.read_config(settings)
    except ValueError as error:
        file, text = path / MODEL_CONFIG if path.is_dir() else path, str(error)
        own = text.removeprefix(f"{MODEL_CONFIG} ")
        between = ": " if own == text else " "
        raise ValueError(f"{file}{between}{own}") from error


def check_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns ``settings``, read from ``path``; raises if the model type is unknown."""
    found = settings.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        hint = ""
        if isinstance(found, str) and found:
            hint = f" Did you mean: {nearest(found, FAMILIES)}?"
        raise ValueError(
            f"{path}: model_type must be one of {sorted(FAMILIES)}; got {found!r}."
            f"{hint} Build other models in Flax and adapt them with `adapt`."
        )
    return settings


def _bare_names(tensors: Iterable[str], family: Family, path: Path) -> dict[str, str]:
    """Returns each tensor's name in the file by its bare name, `Family.bare_name`."""
    names: dict[str, str] = {}
    faults = []
    for name in sorted(tensors):
        bare = family.bare_name(name)
        if bare in names:
            faults.append(f"both {names[bare]} and {name}")
        names[bare] = name
    for copy, bare in family.copies.items():
        if copy in names and bare not in names:
            names[bare] = names.pop(copy)
    if faults:
        raise ValueError(f"{path} must hold each tensor once; got {'; '.join(faults)}.")
    return names
