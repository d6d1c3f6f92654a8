"""`LoadedModel`: a pretrained model in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from lora_jax.array_types import PyTree
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.models.family import Family
from lora_jax.models.sentence_config import SentenceConfig
from lora_jax.names import CLASSIFIER
from lora_jax.tree.token_rows import base_of


class LoadedModel(NamedTuple):
    """A pretrained model in memory.

    Attributes:
      module: the Linen module; ``module.apply(variables, ...)``.
      variables: ``{"params": ...}``, or, with an adapter or a `LoRAConfig`, the
        collections ``frozen``, ``lora`` and ``params``.
      config: the module's config.
      tokenizer: the model's tokenizer, or None.
      path: the folder or file that was read.
      family: how Hugging Face names its config keys and tensors.
      unused: names of tensors in the file that the module doesn't use.
      new: paths of parameters that were initialised here, not read (a head).
      extra: what `save_adapter` was asked to store with the adapter; empty for another
        tool's adapter, None without one.
      added: new tokens of its vocabulary, which the files at ``path`` don't have.
    """

    module: nn.Module
    variables: dict[str, PyTree]
    config: Any
    tokenizer: Tokenizer | None
    path: Path
    family: Family
    unused: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None
    added: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Shapes of one example's inputs."""
        return self.family.inputs(self.config)

    @property
    def params(self) -> dict[str, PyTree]:
        """The base's parameters, a plain nested dictionary."""
        return base_of(self.variables)

    def unused_text(self) -> str:
        """Lists unused tensors; for a multimodal folder, how many of each part.

        Returns:
          One line; empty if all is used.
        """
        if not self.family.is_multimodal:
            return ", ".join(self.unused)
        parts = [n.removeprefix("model.").split(".")[0] for n in self.unused]
        names = ", ".join(dict.fromkeys(parts))
        return (
            names and f"{names}: {len(parts)} tensors stay on disk; text in, text out"
        )

    @property
    def sentence(self) -> SentenceConfig | None:
        """How embeddings are made, by the folder's ``modules.json``; None without."""
        return getattr(getattr(self.module, "model", self.module), "sentence", None)

    @property
    def has_head(self) -> bool:
        """Whether an encoder has a classification head."""
        return CLASSIFIER in self.params
