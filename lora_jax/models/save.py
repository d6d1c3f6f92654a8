"""Saves a model's parameters as a Hugging Face folder.

Parameters loaded by `load_model` and changed by a merge get the names, prefix and
dtypes of the source folder; unchanged ones keep their exact bytes, even if they were
loaded in another dtype. Tensors that the module doesn't use (BERT's pooler, say) are
copied, so that the folder still fits its ``config.json`` and transformers loads it; a
duplicate of a tied embedding is left out. The source's other files are copied too.
A bare encoder that was given a head is saved as the class with that head.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.atomic import new_folder, write_text
from lora_jax.files.safetensors import SINGLE, write_tensors
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.models.added_tokens import open_grown, write_tokenizer
from lora_jax.models.load import OURS
from lora_jax.models.sentence_config import read_sentence
from lora_jax.models.sentence_files import HEAD, with_sentence, write_denses
from lora_jax.models.side_files import copy_side_files
from lora_jax.models.source import (
    MODEL_CONFIG,
    TIED_HEAD,
    Source,
    is_mxfp4,
)
from lora_jax.models.stacking import file_slices
from lora_jax.names import CLASSIFIER, KERNEL, POOLER
from lora_jax.tree.paths import flatten

MERGED = "merged"  # under `OURS` in config.json: what was merged into the model


def save_model(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    source: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    merged: Mapping[str, Any] | None = None,
    add_tokens: Sequence[str] = (),
) -> Path:
    """Writes parameters as a Hugging Face folder.

    Args:
      directory: the folder to write; created if absent; it must not be the source.
      params: the module's parameters, a nested dict, such as ``adapted.merge(...)``;
        rounded to the source folder's dtypes if they were loaded in others.
      source: the folder that the model was loaded from (`LoadedModel.path`).
      pooling: the pooling that an encoder's head was trained with; kept in
        ``config.json`` for `load_model`. None: "pooler" if ``params`` has one, else the
        family's own ("cls", DINOv2 "cls_mean") or "mean".
      merged: the merged adapter, as `describe_adapter` returns it; kept in
        ``config.json``, so that `load_model` doesn't attach the same one again.
      add_tokens: the new tokens that the model was loaded with (`LoadedModel.added`),
        which the folder's tokenizer gets too.

    Returns:
      The folder.

    Warns:
      UserWarning: if transformers would feed the head another pooling than in training.

    Raises:
      ValueError: if, compared with the source, parameters are missing, unexpected,
        wrongly shaped or not finite (in the source's dtype); lists all of them, and
        nothing is written.
      OSError: if a file can't be written.
    """
    directory, source = Path(directory), Path(source)
    if directory.exists() and directory.resolve() == source.resolve():
        raise ValueError(
            f"directory must differ from the source {source}; they are the same. The "
            "base is never overwritten."
        )
    (model, tokenizer), sentence = open_grown(source, add_tokens), None
    if HEAD in params:
        sentence = read_sentence(source)
        model = with_sentence(model, sentence)
    names, family, settings = model.names, model.family, dict(model.settings)

    if is_mxfp4(settings):
        del settings["quantization_config"]  # it is written as it was read, in bfloat16
    flat = flatten(params)
    ours = {  # by bare name: the layer's path, and its part of the array
        family.tensor_name(path): (path, part.of(flat[part.path]))
        for path, part in file_slices(family, flat).items()
    }
    faults = [
        f"missing: {name}"
        for name in names
        if name not in ours and not family.is_unused(name)
    ]
    if not family.head and TIED_HEAD in ours and model.config.is_tied:
        untied = {"tie_word_embeddings": False}  # a tied table whose sides differ now
        if family.has_source:  # T5 scales by that key, but for this one
            untied["scale_decoder_outputs"] = model.config.logit_scale != 1
        settings |= untied
        if isinstance(text := settings.get("text_config"), dict):
            settings["text_config"] = text | untied
        model = model.with_own_head()
    if family.head and pooling is None:
        own = "mean" if family.head_pooling == POOLER else family.head_pooling
        pooling = POOLER if POOLER in params else own
    tensors = {}
    for name, (path, part) in ours.items():
        array = family.to_file(path, np.asarray(part))
        head = family.is_head(name)
        if name not in model.names and not head:
            faults.append(f"unexpected: {path}")
            continue
        if not head and array.shape != model.shape(name):
            wanted = list(model.shape(name))
            faults.append(f"shape: {name} must be {wanted}; got {list(array.shape)}")
            continue
        # A GGUF file's dtypes are quantised, so its tensors stay as they were loaded.
        if name in model.names and model.path.is_dir():
            array = _as_stored(model, name, array)
        if np.isfinite(array).all():
            tensors[names.get(name, name)] = array
        else:
            faults.append(f"not finite: {path}")
    if faults:
        raise ValueError(
            f"params must fit the model of {source}; {len(faults)} tensors don't, and "
            "nothing was written.\n  " + "\n  ".join(faults)
        )
    if CLASSIFIER in params and family.head and pooling != family.head_pooling:
        warnings.warn(
            f"the head was trained on {pooling!r} pooling, and transformers feeds it "
            f"{family.head_pooling!r}: there its logits are wrong, without an error. "
            "`load_model` and lora-jax read the pooling from config.json.",
            stacklevel=2,
        )
    for name, original in names.items():
        is_copy = name == TIED_HEAD or name in family.copies
        if name not in ours and not is_copy and not family.is_head(name):
            tensors[original] = model.tensors[original]

    if (
        CLASSIFIER in params
        and pooling == family.head_pooling
        and model.is_bare
        and model.architecture.endswith("Model")
    ):  # transformers has a class with this head
        tensors = {
            name if family.is_head(name) else family.prefix + name: tensor
            for name, tensor in tensors.items()
        }
        kind = re.sub("Model$", family.head_class, model.architecture)
        settings["architectures"] = [kind]
    kept = settings.get(OURS)
    before = kept.get(MERGED, []) if isinstance(kept, dict) else []
    ours_kept: dict[str, Any] = {}
    if before or merged:
        ours_kept[MERGED] = [*before, *([dict(merged)] if merged else [])]
    if family.head:
        ours_kept["pooling"] = pooling
    if CLASSIFIER in params and family.head:
        count = params[CLASSIFIER][KERNEL].shape[-1]
        if len(settings.get("id2label") or {}) != count:
            settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            settings["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    if ours_kept:
        settings[OURS] = ours_kept
    with new_folder(directory) as new:
        if sentence is not None:
            write_denses(new, source, sentence, tensors)
        write_tensors(new / SINGLE, tensors, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        write_text(new / MODEL_CONFIG, text)
        if source.is_file() and (kept := tokenizer or load_tokenizer(source)):
            kept.save(new)  # a GGUF file holds it
        copy_side_files(source, new, leave_out=directory)
        if tokenizer is not None:
            write_tokenizer(new, tokenizer, source)
    return directory


def _as_stored(model: Source, name: str, array: np.ndarray) -> np.ndarray:
    """Returns a tensor in the file's dtype, with the file's exact bits if unchanged."""
    if array.dtype == model.dtype(name):
        return array
    stored = model.tensors[model.names[name]]
    is_head = array.shape != stored.shape  # of other classes
    with np.errstate(over="ignore"):  # reported as not finite
        if not is_head and np.array_equal(stored.astype(array.dtype), array):
            return stored
        return array.astype(stored.dtype)
