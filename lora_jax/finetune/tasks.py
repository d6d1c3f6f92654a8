"""Selecting the task: `Language`, `Classification` or `Pairs` by the kind of model.

Lines with an anchor and a positive text are the task `Embeddings`, of any model.

`train`, `plan` and `eval` all build their jobs here, so they interpret settings alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.finetune.checks import (
    check_experts,
    check_mixed,
    check_no_pairs,
    check_sequence,
)
from lora_jax.finetune.classification import open_classification
from lora_jax.finetune.devices import Devices, open_devices
from lora_jax.finetune.embeddings import open_embeddings
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.job import SPLITS, Job
from lora_jax.finetune.language import open_language
from lora_jax.finetune.mixed_data import names_adapters
from lora_jax.finetune.pairs import open_pairs
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.dual import ImageTowerConfig, TextTowerConfig
from lora_jax.models.source import open_source
from lora_jax.names import OWNER
from lora_jax.train.text_pairs import has_text_pairs


def open_job(
    settings: RunSettings,
    *,
    splits: Sequence[str] = SPLITS,
    extra: Mapping[str, Any] | None = None,
    is_strict: bool = True,
    devices: Devices | None = None,
) -> Job:
    """Reads the data, loads the base, adds new adapters and tokenises.

    Args:
      settings: settings of the run.
      splits: the splits to read; other files are not read, except the training file if
        classes or a held-out validation split come from it.
      extra: what was saved beside the run's adapter, if any.
      is_strict: whether the mesh of the settings must fit; see `open_devices`.
      devices: used instead of that mesh, if given.

    Returns:
      The job.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if data or model can't be read, or the adapters don't match the model.
    """
    if names_adapters(settings.data):
        check_mixed(settings)
    if devices is None:
        devices = open_devices(settings, is_strict=is_strict)
    source = open_source(settings.model.path)
    if settings.model.add_tokens and source.family.kind != "decoder":
        raise UserError(
            f"model.add_tokens must be empty for {source.path}, an "
            f"{source.family.kind}: only decoders get new tokens."
        )
    check_experts(source.config, settings, axis=settings.mesh.expert)
    if has_text_pairs(settings.data.train):
        return open_embeddings(settings, devices, source, splits=splits)
    check_no_pairs(settings)
    check_sequence(source.family.kind, source.config, settings.mesh.sequence)
    if isinstance(source.config, (TextTowerConfig, ImageTowerConfig)):
        raise UserError(
            f"{settings.model.path} is an encoder of CLIP or SigLIP: train a CLIP text "
            "encoder on pairs of texts, lines with an 'anchor' and a 'positive', and "
            "the others in Python, on `lora_jax.embedding_loss`."
        )
    if source.family.kind == "encoder":
        return open_classification(
            settings, devices, source, splits=splits, extra=extra or {}
        )
    if source.family.has_source:
        if names_adapters(settings.data):
            raise UserError(
                f"examples of an encoder-decoder can't name their {OWNER}; train one "
                "run for each."
            )
        return open_pairs(settings, devices, source, splits=splits)
    adapters = (extra or {}).get("adapters", ())
    return open_language(settings, devices, source, splits=splits, adapters=adapters)
