"""A model's parameters back into a plain Hugging Face folder.

Parameters that `load_model` read and a merge changed get the names, prefix and dtypes
of the source folder. Tensors that the module doesn't use (BERT's pooler, say) are
copied, so that the folder still fits its ``config.json`` and transformers loads it; a
second copy of a tied embedding is left out.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.atomic import new_folder, write_text
from lora_jax.files.images import IMAGE_CONFIG
from lora_jax.files.safetensors import SINGLE, write_tensors
from lora_jax.files.special_tokens import (
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
)
from lora_jax.files.tokenizer import TOKENIZER_FILE, load_tokenizer
from lora_jax.models.load import OURS, TIED_HEAD
from lora_jax.models.source import MODEL_CONFIG, open_source
from lora_jax.models.stacking import layer_slices
from lora_jax.names import CLASSIFIER, KERNEL, POOLER
from lora_jax.tree.paths import flatten

# Files that a model folder needs beside weights and config.
OTHER_FILES = (
    IMAGE_CONFIG,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    GENERATION_CONFIG,
    TEMPLATE,
)


def save_model(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    source: str | os.PathLike[str],
    *,
    pooling: str | None = None,
) -> Path:
    """Writes parameters as a Hugging Face folder.

    Args:
      directory: the folder to write; made if needed, and refused if it is the source.
      params: the module's parameters, a nested dict, such as ``adapted.merge(...)``;
        rounded to the dtypes of the source folder where they were loaded in others.
      source: the folder that the model was loaded from (`LoadedModel.path`).
      pooling: the pooling that an encoder's head was trained on; kept in
        ``config.json`` for `load_model`. None: "pooler" if ``params`` has one, else the
        family's own ("cls", DINOv2 "cls_mean") or "mean".

    Returns:
      The folder.

    Raises:
      ValueError: if parameters are missing, unexpected, mis-shaped or not finite (in
        the source's dtype) against the source; all of them are listed and nothing is
        written.
      OSError: if a file can't be written.
    """
    directory, source = Path(directory), Path(source)
    if directory.exists() and directory.resolve() == source.resolve():
        raise ValueError(
            f"directory must be another folder than the source {source}; it is the "
            "same. The base is never overwritten."
        )
    model = open_source(source)
    names, family, settings = model.names, model.family, dict(model.settings)

    flat = flatten(params)
    ours = {  # by bare name: the path of the layer's leaf, and its part of the array
        family.tensor_name(path): (path, part.of(flat[part.path]))
        for path, part in layer_slices(flat).items()
    }
    faults = [
        f"missing: {name}"
        for name in names
        if name not in ours and not family.is_unused(name)
    ]
    tensors = {}
    for name, (path, part) in ours.items():
        array = family.to_file(path, np.asarray(part))
        # A GGUF file's dtypes are quantised ones; its tensors stay as they were loaded.
        if name in names and model.path.is_dir():
            with np.errstate(over="ignore"):  # reported below as not finite
                array = array.astype(model.dtype(name), copy=False)
        head = family.is_head(name)
        if name not in names and not head:
            faults.append(f"unexpected: {path}")
        elif not head and array.shape != model.shape(name):
            wanted = list(model.shape(name))
            faults.append(f"shape: {name} must be {wanted}; got {list(array.shape)}")
        elif not np.isfinite(array).all():
            faults.append(f"not finite: {path}")
        else:
            tensors[names.get(name, name)] = array
    if faults:
        raise ValueError(
            f"params must fit the model of {source}; {len(faults)} tensors don't, and "
            "nothing was written.\n  " + "\n  ".join(faults)
        )
    for name, original in names.items():
        if name not in ours and name != TIED_HEAD and not family.is_head(name):
            tensors[original] = model.tensors[original]

    if family.head:
        if pooling is None:
            own = "mean" if family.head_pooling == POOLER else family.head_pooling
            pooling = POOLER if POOLER in params else own
        settings[OURS] = {"pooling": pooling}
    if CLASSIFIER in params and family.head:
        count = params[CLASSIFIER][KERNEL].shape[-1]
        if len(settings.get("id2label") or {}) != count:
            settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            settings["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    with new_folder(directory) as new:
        write_tensors(new / SINGLE, tensors, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        write_text(new / MODEL_CONFIG, text)
        if source.is_file() and (tokenizer := load_tokenizer(source)) is not None:
            tokenizer.save(new)  # a GGUF file holds it
        for name in OTHER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
    return directory
