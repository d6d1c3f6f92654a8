"""The base that an adapter is exported for: its module and names, without weights."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from lora_jax.array_types import PyTree
from lora_jax.models.added_tokens import open_grown
from lora_jax.models.family import Family, config_of
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.sentence_config import read_sentence
from lora_jax.models.sentence_files import with_sentence
from lora_jax.models.source import TIED_HEAD, open_source
from lora_jax.models.source import Source as ModelSource
from lora_jax.names import (
    CLASSIFIER,
    FROZEN,
    HEAD,
    KERNEL,
    LAYERS,
    LORA,
    PARAMS,
    POOLER,
)
from lora_jax.nn.adapt import Adapted
from lora_jax.nn.trace import Example

Source = LoadedModel | str | os.PathLike[str]


class Base(NamedTuple):
    """A base without its weights."""

    module: nn.Module
    source: ModelSource
    pooling: str | None  # that the head was trained with; None if unknown

    @property
    def family(self) -> Family:
        """Its family."""
        return self.source.family

    @property
    def task(self) -> str | None:
        """PEFT's name for what the model does; None for an encoder."""
        if self.family.head:
            return None
        predicts = getattr(config_of(self.module), "predicts", True)
        is_bare = getattr(self.module, "sentence", None) is not None or not predicts
        return "FEATURE_EXTRACTION" if is_bare else self.family.task

    @property
    def example(self) -> Example:
        """Shapes of its inputs."""
        return Example.of(*self.family.inputs(config_of(self.module)))


def open_base(
    source: Source, variables: Mapping[str, PyTree], pooling: str | None
) -> Base:
    """Finds the module, from a model in memory or from the adapter's leaves."""
    if isinstance(source, LoadedModel):
        module = source.module
        module = module.model if isinstance(module, Adapted) else module
        found, _ = open_grown(source.path, source.added)
        found = with_sentence(found, source.sentence)
        pooling = pooling or getattr(module, "pooling", None)
        return Base(module, found, pooling)
    found = open_source(source)
    family, trees = found.family, [variables.get(c, {}) for c in (FROZEN, LORA, PARAMS)]
    paths = {key for tree in trees for key in tree}
    options: dict[str, Any] = {}
    sizes = found.config
    if not family.head and HEAD in paths and sizes.is_tied:
        sizes = dataclasses.replace(sizes, is_tied=False)
    if family.head:
        heads = [tree[CLASSIFIER] for tree in trees if CLASSIFIER in tree]
        kernel = next((head[KERNEL] for head in heads if KERNEL in head), None)
        options["num_labels"] = None if kernel is None else kernel.shape[-1]
        if pooling or POOLER in paths:
            options["pooling"] = pooling or POOLER
    elif LAYERS in paths:
        options["scan_layers"] = True
    if options.get("num_labels") is None and not pooling and found.path.is_dir():
        options["sentence"] = read_sentence(found.path)
        found = with_sentence(found, options["sentence"])
        family = found.family
        if not (family.head or sizes.is_tied or TIED_HEAD in found.names):
            sizes = dataclasses.replace(sizes, has_head=options["sentence"] is None)
    module = family.module(sizes, **options)
    return Base(module, found, pooling)


def auto_class(base: Base, *, has_head: bool) -> tuple[bool, dict[str, str] | None]:
    """Returns how transformers opens the base: as its config says, or with a head.

    That is whether module names have the family's prefix, and PEFT's ``auto_mapping``.
    """
    source = base.source
    if not base.family.head:  # PEFT goes by the task
        return base.task == base.family.task, None
    name, is_bare = source.architecture, source.is_bare
    if has_head and is_bare:
        name, is_bare = name and re.sub("Model$", base.family.head_class, name), False
    kind = source.settings["model_type"].replace("-", "_")
    library = f"transformers.models.{kind}.modeling_{kind}"
    mapping = {"base_model_class": name, "parent_library": library}
    return not is_bare, mapping if name else None


def check_head(base: Base) -> None:
    """Raises if transformers would feed the head another pooling than in training."""
    wanted = base.family.head_pooling
    if base.pooling not in (None, wanted):
        raise ValueError(
            f"the head must be trained on {wanted!r} pooling for transformers to use "
            f"it; it was trained on {base.pooling!r}. Omit it (skip_head=True, "
            "--skip-head) to export only the adapter."
        )
