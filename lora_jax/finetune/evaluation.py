"""Metrics of a run's adapter, or of its base, on the run's data or another file."""

from typing import NamedTuple

from lora_jax.files.adapter import load_adapter
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import perplexity
from lora_jax.finetune.job import source_of
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import ADAPTER, RunFolder
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.tasks import open_job
from lora_jax.names import FROZEN, SAVED
from lora_jax.train.loop import evaluate
from lora_jax.train.step import make_eval_step


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: metrics by name, including a decoder's perplexity.
      examples: number of examples.
      data: description of their source.
      model: description of the model.
      devices: a remark about the devices, or None.
    """

    metrics: dict[str, float]
    examples: int
    data: str
    model: str
    devices: str | None


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
    adapter = load_adapter(folder / ADAPTER)
    needed = () if data else (split,)
    if is_base:
        needed = ("train", "validation", split)
    job = open_job(settings, splits=needed, extra=adapter.extra, is_strict=False)
    if data:
        wanted = job.tokenize_file(data)
    elif split in job.splits:
        wanted = job.splits[split]
    else:
        raise UserError(
            f"the run has no {split} split: its data.{split} is null. Choose a file "
            "with --data, or another split, e.g. --split validation."
        )

    if is_base:
        found = job.baseline({**job.splits, "test": wanted}, out)
        model, metrics = found["what"], {job.metric: found[f"test_{job.metric}"]}
    else:
        expected = {name: job.variables.get(name, {}) for name in SAVED}
        adapter = load_adapter(
            folder / ADAPTER, expected=expected, fingerprint=job.fingerprint
        )
        variables = {FROZEN: job.variables[FROZEN], **adapter.variables}
        variables = job.devices.place(variables, job.targets)
        step = make_eval_step(job.loss(job.adapted, is_training=False))
        batches = job.evaluation(wanted)
        with out.progress("evaluate", batches.steps_per_epoch) as tick:
            measured = evaluate(step, variables, job.devices.one_epoch(batches, tick))
        model = f"adapter of step {adapter.extra['step']}"
        metrics = {name: measured[name] for name in job.metrics}
    if job.metric == "loss":
        metrics["perplexity"] = perplexity(metrics["loss"])
    source = data or source_of(settings.data, split)
    return Evaluation(metrics, len(wanted.examples), source, model, job.devices.note)
