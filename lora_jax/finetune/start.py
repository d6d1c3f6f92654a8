"""The start of a run's adapters, kept in the run folder where a resumed run needs it.

PiSSA's A0 and B0 are part of the update for good, and another machine's SVD may round
them otherwise; EVA's ranks are those of the run. So the run folder holds them in
``start/``, an adapter folder.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import CONFIG, load_adapter, save_adapter
from lora_jax.finetune.job import Job, attach
from lora_jax.finetune.run_folder import START
from lora_jax.nn.adapt import adapt
from lora_jax.nn.data_start import lora_ga_init
from lora_jax.nn.eva import eva_init

STEPS = 8  # batches that a start from data takes


def with_start(job: Job, folder: Path) -> Job:
    """Gives a job the adapters that its run started with, or starts from its data.

    Args:
      job: with new adapters; for LoRA-GA they start from the gradient of the run's
        first `STEPS` batches, for EVA from the layers' inputs in them, unless the
        folder keeps them.
      folder: the run folder.

    Returns:
      The job, changed.

    Raises:
      ValueError: if what is kept is damaged or of another run.
    """
    kept = folder / START
    if (kept / CONFIG).is_file() and _is_kept(job):
        if job.lora.init == "eva":
            adopt(job, load_adapter(kept, fingerprint=job.fingerprint).config)
        found = job.load_adapter(kept).variables
    elif job.lora.init == "lora_ga":
        loss = job.loss(job.adapted, is_training=False)
        found = lora_ga_init(job.adapted, job.variables, loss, _first(job))
    elif job.lora.init == "eva":
        module = job.loaded.module
        if hasattr(module, "remat"):
            module = module.clone(remat="none")
        seen = adapt(module, job.lora, *job.loaded.inputs)
        loss = job.loss(seen, is_training=False)
        made, found = eva_init(seen, job.variables, loss, _first(job), mask=_counted)
        adopt(job, made.config)
    else:
        return job
    job.variables = job.devices.place({**job.variables, **found}, job.targets)
    return job


def adopt(job: Job, lora: LoRAConfig) -> None:
    """Gives a job new adapters of another config, such as one with EVA's ranks."""
    for name, value in attach(job.settings, job.devices, job.loaded, lora).items():
        setattr(job, name, value)


def _first(job: Job) -> Iterator[Any]:
    """Yields the run's first batches."""
    batches = job.batches()
    return map(job.devices.feed(batches), range(min(STEPS, batches.steps_per_epoch)))


def _counted(batch: Mapping[str, Any]) -> Any:
    """Returns the mask of a batch's tokens: an encoder's, else of those trained on."""
    return batch.get("attention_mask", batch["weights"])


def _is_kept(job: Job) -> bool:
    return job.lora.fixes_leaves or job.lora.init == "eva"


def keep_start(job: Job, folder: Path) -> None:
    """Keeps a new run's adapters, where `with_start` would need them."""
    if _is_kept(job) and not (folder / START / CONFIG).is_file():
        save_adapter(folder / START, job.variables, job.lora, job.fingerprint)
