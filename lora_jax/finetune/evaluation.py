"""Metrics of a run's adapter, or of its bare base, on its own data or any other."""

from typing import NamedTuple

from lora_jax.files.adapter import load_adapter
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import perplexity
from lora_jax.finetune.job import source_of
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import ADAPTER, RunFolder
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.tasks import open_job
from lora_jax.names import FROZEN, TRAINABLE
from lora_jax.train.loop import evaluate
from lora_jax.train.step import make_eval_step


class Evaluation(NamedTuple):
    """What was measured.

    Attributes:
      metrics: by name; of a decoder the perplexity too.
      examples: how many.
      data: where they are from.
      model: what was measured, in words.
      devices: what there is to say about them, if anything.
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
      folder: of the run, with an adapter; see `open_run`.
      settings: of the run.
      data: a JSONL file of examples, or None for the run's own ``split``.
      split: "train", "validation" or "test", without ``data``.
      is_base: whether to measure the frozen base: an encoder's with a linear head
        fitted on the training split.
      reporter: shows the progress.

    Returns:
      The metrics.

    Raises:
      UserError: if the run has no such split.
      ValueError: if data can't be read, or the adapter was not made on this base.
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
        raise UserError(f"the run has no {split} split; name a data file to evaluate.")

    if is_base:
        found = job.baseline({**job.splits, "test": wanted}, out)
        what, metrics = found["what"], {job.metric: found[f"test_{job.metric}"]}
    else:
        expected = {name: job.variables.get(name, {}) for name in TRAINABLE}
        adapter = load_adapter(
            folder / ADAPTER, expected=expected, fingerprint=job.fingerprint
        )
        variables = {FROZEN: job.variables[FROZEN], **adapter.variables}
        variables = job.devices.place(variables, job.targets)
        step = make_eval_step(job.loss(job.adapted, is_training=False))
        batches = job.evaluation(wanted)
        with out.progress("evaluate", batches.steps_per_epoch) as tick:
            measured = evaluate(step, variables, job.devices.one_epoch(batches, tick))
        what = f"adapter of step {adapter.extra['step']}"
        metrics = {name: measured[name] for name in job.metrics}
    if job.metric == "loss":
        metrics["perplexity"] = perplexity(metrics["loss"])
    source = data or source_of(settings.data, split)
    return Evaluation(metrics, len(wanted.examples), source, what, job.devices.note)
