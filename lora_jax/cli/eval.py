"""`lora-jax eval`: metrics of a run's adapter, or of the bare base, on a data file."""

import argparse
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.files.adapter import load_adapter
from lora_jax.finetune import job as jobs
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import metric_text, perplexity
from lora_jax.finetune.run_folder import ADAPTER, open_run
from lora_jax.finetune.settings import load_settings
from lora_jax.finetune.tasks import open_job
from lora_jax.names import FROZEN, TRAINABLE
from lora_jax.train.loop import evaluate
from lora_jax.train.step import make_eval_step


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Evaluates.

    Args:
      args: ``run`` or ``config`` (with ``overrides``), ``data``, ``split``, ``base``.
      out: where to print.

    Returns:
      The metrics (``loss``, ``accuracy`` of an encoder, ``perplexity`` of a decoder),
      how many examples, and of what.
    """
    if (args.run is None) == (args.config is None):
        raise UserError(
            "eval takes either a CONFIG or --run DIR, and just one of them."
        )
    asked = None if args.run else load_settings(args.config, args.overrides)
    folder, settings = open_run(args.run if asked is None else asked.output.dir)
    if asked is not None:
        folder.check_settings(
            asked,
            f"Evaluate it as it is with --run {folder.path}; --data gives it "
            "another file.",
        )
    source = args.data or jobs.source_of(settings.data, args.split)
    adapter = load_adapter(folder / ADAPTER)
    needed = () if args.data else (args.split,)
    if args.base:
        needed = ("train", "validation", args.split)
    job = open_job(settings, splits=needed, extra=adapter.extra, is_strict=False)
    if args.data:
        wanted = job.tokenize_file(args.data)
    elif args.split not in job.splits:
        raise UserError(
            f"the run has no {args.split} split. --data FILE evaluates any other file."
        )
    else:
        wanted = job.splits[args.split]

    if args.base:
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
    out.heading(f"{what} on {source}")
    shown = [(name, metric_text(name, value)) for name, value in metrics.items()]
    if "loss" in metrics and job.metric == "loss":
        metrics["perplexity"] = perplexity(metrics["loss"])
        shown.append(("perplexity", f"{metrics['perplexity']:.3f}"))
    count = len(wanted.examples)
    notes = [("devices", job.devices.note)] if job.devices.note else []
    out.facts([("examples", f"{count:,}"), *shown, *notes])
    return {
        **metrics,
        "examples": count,
        "data": source,
        "model": what,
        "run": str(folder.path),
    }
