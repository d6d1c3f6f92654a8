"""Which task a model is trained for: a decoder learns to write, an encoder to classify.

Every command that touches a model builds its job here, so that `train`, `plan` and
`eval` mean the same by the same settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.finetune.classification import open_classification
from lora_jax.finetune.devices import open_devices
from lora_jax.finetune.job import SPLITS, Job
from lora_jax.finetune.language import open_language
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.source import open_source


def open_job(
    settings: RunSettings,
    *,
    splits: Sequence[str] = SPLITS,
    extra: Mapping[str, Any] | None = None,
    is_strict: bool = True,
) -> Job:
    """Reads the data, loads the base, puts fresh adapters on it, tokenises.

    Args:
      settings: of the run.
      splits: which splits are wanted; files of others aren't read, but for train's
        where classes or a held-out validation come from it.
      extra: what an adapter of the run has kept beside it, where there is one.
      is_strict: whether the mesh of the settings must fit; see `open_devices`.

    Returns:
      The job.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if data or model can't be read, or the adapters don't fit.
    """
    devices = open_devices(settings, is_strict=is_strict)
    if open_source(settings.model.path).family.head:
        return open_classification(settings, devices, splits=splits, extra=extra or {})
    return open_language(settings, devices, splits=splits)
