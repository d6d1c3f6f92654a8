"""Opening the jobs of a sweep: its groups share the base and the data if they can."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax.finetune import job as jobs
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.settings import RunSettings, differences
from lora_jax.finetune.sweep_grid import OWN, Point
from lora_jax.finetune.tasks import open_job
from lora_jax.models.source import open_source
from lora_jax.models.stacking import can_scan
from lora_jax.nn.adapt import adapt
from lora_jax.nn.data_start import start_along

# Settings that nothing depends on of what a job reads, but `can_scan`.
UNREAD = {f"lora.{name}" for name in ("targets", "exclude", "dora", "lora_fa", "init")}
UNREAD |= {"train.batch_size", "train.accumulate"}


def opened(settings: RunSettings, before: jobs.Job | None) -> jobs.Job:
    """Opens the job of a group, over the base and data of another where they are alike.

    Args:
      settings: of the group's first run.
      before: the job of another group, if there is one.

    Returns:
      The job.
    """
    if before is None or not _reads_alike(settings, before):
        return open_job(settings, devices=Devices())
    return before.with_settings(settings)


def check_sources(points: Sequence[Point]) -> None:
    """Checks that every file and model of a sweep is there, before the first run.

    Raises:
      FileNotFoundError: listing the files that are missing; or if a model is.
    """
    data = [point.settings.data for point in points]
    files = {path for own in data for path in (own.train, own.validation, own.test)}
    if lost := sorted(path for path in files if path and not Path(path).is_file()):
        raise FileNotFoundError(
            f"data file{'s' * (len(lost) > 1)} {', '.join(lost)} must exist; there is "
            "no such file."
        )
    for path in {point.settings.model.path: None for point in points}:
        open_source(path)


def check_adapters(points: Sequence[Point], job: jobs.Job) -> None:
    """Checks that a model can have every run's adapters, before the first run.

    Args:
      points: the runs; those of another model, or with another layout, are left out.
      job: of one of them.

    Raises:
      ValueError: listing what doesn't fit.
    """
    base, faults = job.loaded, {}
    own = [point.settings for point in points]
    for lora in dict.fromkeys(
        job.lora_for(settings)
        for settings in own
        if settings.model == job.settings.model and _scans_alike(settings, job)
    ):
        try:
            adapted = adapt(base.module, lora, *base.inputs)
            targets = adapted.targets(base.params)
            if lora.init == "lora_ga":
                for target in targets:
                    kernel = jax.ShapeDtypeStruct(target.kernel_shape, jnp.float32)
                    along = functools.partial(start_along, target, gamma=1.0)
                    jax.eval_shape(along, kernel)
            elif lora.starts_from_base:
                jax.eval_shape(adapted.attach, base.params, jax.random.key(0))
        except ValueError as error:
            faults[str(error)] = None
    if faults:
        raise ValueError("\n".join(faults))


def _reads_alike(settings: RunSettings, before: jobs.Job) -> bool:
    names = {line.split(":")[0] for line in differences(before.settings, settings)}
    return not names - OWN - UNREAD and _scans_alike(settings, before)


def _scans_alike(settings: RunSettings, before: jobs.Job) -> bool:
    """Whether a model is scanned, or not, with other adapters too."""
    lora, module = before.lora_for(settings), before.loaded.module
    scans = getattr(module, "scan_layers", None)
    is_fixed = scans is None or settings.model.scan is not None
    return is_fixed or scans == can_scan(lora, before.loaded.config)
