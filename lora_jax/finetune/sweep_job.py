"""Opening the jobs of a sweep: its groups share the base and the data if they can."""

from lora_jax.finetune import job as jobs
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.settings import RunSettings, differences
from lora_jax.finetune.sweep_grid import OWN
from lora_jax.finetune.tasks import open_job
from lora_jax.models.stacking import can_scan

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


def _reads_alike(settings: RunSettings, before: jobs.Job) -> bool:
    names = {line.split(":")[0] for line in differences(before.settings, settings)}
    if names - OWN - UNREAD:
        return False
    lora, module = before.lora_for(settings), before.loaded.module
    scans = getattr(module, "scan_layers", None)
    is_fixed = scans is None or settings.model.scan is not None
    return is_fixed or scans == can_scan(lora, before.loaded.config)
