"""The start of a run's adapters, kept in the run folder where a resumed run needs it.

PiSSA's A0 and B0 are part of the update for good, and another machine's SVD may round
them otherwise. So the run folder holds them in ``start/``, an adapter folder.
"""

from pathlib import Path

from lora_jax.files.adapter import CONFIG, load_adapter, save_adapter
from lora_jax.finetune.job import Job
from lora_jax.finetune.run_folder import START
from lora_jax.nn.data_start import lora_ga_init

STEPS = 8  # batches whose gradient is taken


def with_start(job: Job, folder: Path) -> Job:
    """Gives a job the adapters that its run started with, or starts from its data.

    Args:
      job: with new adapters; for LoRA-GA they start from the gradient of the run's
        first `STEPS` batches, unless the folder keeps them.
      folder: the run folder.

    Returns:
      The job, changed.

    Raises:
      ValueError: if what is kept is damaged or of another run.
    """
    if (folder / START / CONFIG).is_file() and job.lora.fixes_leaves:
        found = load_adapter(
            folder / START, expected=job.variables, fingerprint=job.fingerprint
        )
        variables = {**job.variables, **found.variables}
    elif job.lora.init == "lora_ga":
        batches = job.batches()
        count = min(STEPS, batches.steps_per_epoch)
        loss = job.loss(job.adapted, is_training=False)
        feed = map(job.devices.feed(batches), range(count))
        variables = lora_ga_init(job.adapted, job.variables, loss, feed)
    else:
        return job
    job.variables = job.devices.place(variables, job.targets)
    return job


def keep_start(job: Job, folder: Path) -> None:
    """Keeps a new run's adapters, where `with_start` would need them."""
    if job.lora.fixes_leaves and not (folder / START / CONFIG).is_file():
        save_adapter(folder / START, job.variables, job.lora, job.fingerprint)
