"""The tensors of a sentence-transformers folder's dense layers, beside the model's.

Each layer has a folder with a file of its own. In memory they are leaves of the model's
tree, under ``sentence_head``, and their tensors are named after their folder.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.safetensors import SINGLE, open_tensors, write_tensors
from lora_jax.models.sentence_config import CONFIG, SentenceConfig
from lora_jax.models.source import Source

LAYER = "linear"  # the layer's name in its file
HEAD = "sentence_head"  # of the tree in memory


class JoinedReader:
    """A model's tensors, and those of files in subfolders, named after these.

    Attributes:
      shapes: of all tensors, by name.
    """

    def __init__(self, reader: Any, others: Mapping[str, Any]):
        self._reader, self._others = reader, dict(others)
        self.shapes = dict(reader.shapes)
        for folder, other in self._others.items():
            self.shapes |= {f"{folder}.{n}": s for n, s in other.shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory."""
        reader, own = self._owner(name)
        return reader[own]

    def pieces(self, name: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor some rows at a time."""
        reader, own = self._owner(name)
        return reader.pieces(own)

    def _owner(self, name: str) -> tuple[Any, str]:
        folder, _, own = name.partition(".")
        other = self._others.get(folder)
        return (self._reader, name) if other is None else (other, own)


def with_sentence(source: Source, sentence: SentenceConfig | None) -> Source:
    """Returns a source that has the tensors of the dense layers after the pooling too.

    Raises:
      FileNotFoundError: if a layer has no safetensors file.
      ValueError: if one is damaged.
    """
    if sentence is None or not sentence.denses:
        return source
    folders = [step.folder for step in sentence.denses]
    others = {folder: open_tensors(source.path / folder) for folder in folders}
    tensors = JoinedReader(source.tensors, others)
    modules = {f"{HEAD}/dense_{i}": f"{f}.{LAYER}" for i, f in enumerate(folders)}
    family = source.family
    family = dataclasses.replace(family, modules={**family.modules, **modules})
    names = {name: name for name in tensors.shapes if name not in source.tensors.shapes}
    return source._replace(
        tensors=tensors, family=family, names={**source.names, **names}
    )


def write_denses(
    folder: Path, source: Path, sentence: SentenceConfig, tensors: dict[str, Any]
) -> None:
    """Writes each dense layer's folder, and takes its tensors out of ``tensors``.

    Args:
      folder: the model folder to write.
      source: the one that was read.
      sentence: names the layers.
      tensors: all that are to be written, by name.
    """
    for step in sentence.denses:
        own = {n: t for n, t in tensors.items() if n.startswith(f"{step.folder}.")}
        for name in own:
            del tensors[name]
        (folder / step.folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / step.folder / CONFIG, folder / step.folder / CONFIG)
        write_tensors(
            folder / step.folder / SINGLE,
            {name.partition(".")[2]: tensor for name, tensor in own.items()},
            metadata={"format": "pt"},
        )
