"""Metrics of a run's adapter, or of its base, on the run's data or another file."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.files.adapter import load_adapter
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import perplexity
from lora_jax.finetune.job import data_files
from lora_jax.finetune.mixed_evaluation import EACH
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import ADAPTER, ADAPTERS, RunFolder
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.start import adopt
from lora_jax.finetune.tasks import open_job
from lora_jax.interop.adapter_folder import adapter_folders
from lora_jax.names import FROZEN, TRAINABLE


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: metrics by name, including a decoder's perplexity.
      examples: number of examples.
      data: description of their source.
      model: description of the model.
      devices: a remark about the devices, or None.
      adapters: metrics of each adapter on its own examples, if the run has several;
        ``metrics`` are then over all examples.
    """

    metrics: dict[str, float]
    examples: int
    data: str
    model: str
    devices: str | None
    adapters: dict[str, dict[str, float]] | None = None


def evaluate_run(
    folder: RunFolder,
    settings: RunSettings,
    *,
    data: str | None = None,
    split: str = "test",
    is_base: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Evaluates a run.

    Args:
      folder: the run folder, with an adapter; see `open_run`.
      settings: settings of the run.
      data: a JSONL file of examples, or None for the run's own ``split``.
      split: "train", "validation" or "test"; ignored with ``data``.
      is_base: whether to evaluate the frozen base: an encoder's with a linear head
        fitted on the training split.
      reporter: shows the progress.

    Raises:
      UserError: if the run has no such split.
      ValueError: if data can't be read, or the adapter was trained on another base.
    """
    out = reporter or Reporter()
    several = adapter_folders(folder / ADAPTERS)
    home = folder / (f"{ADAPTERS}/{several[0]}" if several else ADAPTER)
    adapter = load_adapter(home)
    needed = () if data else (split,)
    if is_base:
        needed = ("train", "validation", split)
    extra = {**adapter.extra, **({"adapters": several} if several else {})}
    job = open_job(settings, splits=needed, extra=extra, is_strict=False)
    if data:
        wanted = job.tokenize_file(data)
    elif split in job.splits:
        wanted = job.splits[split]
    else:
        raise UserError(
            f"the run has no {split} split: its data.{split} is null. Choose a file "
            "with --data, or another split, e.g. --split validation."
        )

    apart = None
    if is_base:
        found = job.baseline({**job.splits, "test": wanted}, out)
        model, metrics = found["what"], {job.metric: found[f"test_{job.metric}"]}
    else:
        if several:
            each = [job.load_adapter(folder / ADAPTERS / n).variables for n in several]
            trained = [{k: one[k] for k in TRAINABLE if k in one} for one in each]
            variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)
            variables = {FROZEN: job.variables[FROZEN], **variables}
            model = f"{len(several)} adapters, each on its own examples,"
        else:
            if job.lora.init == "eva":
                adopt(job, adapter.config)
            adapter = job.load_adapter(home)
            variables = {FROZEN: job.variables[FROZEN], **adapter.variables}
            variables = job.devices.place(variables, job.targets)
            model = f"adapter of step {adapter.extra['step']}"
        step, batches = job.eval_step(job.adapted), job.evaluation(wanted)
        with out.progress("evaluate", batches.steps_per_epoch) as tick:
            stream = job.devices.one_epoch(batches, tick)
            measured = job.measure(step, variables, stream)
        metrics = {name: measured[name] for name in job.metrics}
        apart = measured.get(EACH)
    if job.metric == "loss":
        metrics["perplexity"] = perplexity(metrics["loss"])
    files = data_files(settings.data)
    source = data or files.get(split) or f"{settings.data.train}, {split}"
    count, note = len(wanted.examples), job.devices.note
    return Evaluation(metrics, count, source, model, note, apart)
