"""The start of a run's adapters, kept in the run folder where a resumed run needs it.

PiSSA's A0 and B0 are part of the update for good, and another machine's SVD may round
them otherwise. So the run folder holds them in ``start/``, an adapter folder.
"""

from pathlib import Path

from lora_jax.files.adapter import CONFIG, load_adapter, save_adapter
from lora_jax.finetune.job import Job
from lora_jax.finetune.run_folder import START


def with_start(job: Job, folder: Path) -> Job:
    """Gives a job the adapters that its run started with, if the folder keeps them.

    Args:
      job: with new adapters.
      folder: the run folder.

    Returns:
      The job, changed.

    Raises:
      ValueError: if what is kept is damaged or of another run.
    """
    if not (folder / START / CONFIG).is_file() or not job.lora.fixes_leaves:
        return job
    found = load_adapter(
        folder / START, expected=job.variables, fingerprint=job.fingerprint
    )
    variables = {**job.variables, **found.variables}
    job.variables = job.devices.place(variables, job.targets)
    return job


def keep_start(job: Job, folder: Path) -> None:
    """Keeps a new run's adapters, where `with_start` would need them."""
    if job.lora.fixes_leaves and not (folder / START / CONFIG).is_file():
        save_adapter(folder / START, job.variables, job.lora, job.fingerprint)
