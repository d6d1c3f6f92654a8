"""`lora-jax eval`: metrics of a run's adapter, or of the bare base, on a data file."""

import argparse
from typing import Any

from lora_jax.cli import job as jobs
from lora_jax.cli.baseline import fit_baseline
from lora_jax.cli.console import Console, UserError
from lora_jax.cli.runfolder import ADAPTER, open_run
from lora_jax.cli.settings import load_settings
from lora_jax.io.adapter import load_adapter
from lora_jax.names import FROZEN, TRAINABLE
from lora_jax.train.data import read_jsonl
from lora_jax.train.loop import evaluate
from lora_jax.train.step import make_eval_step


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Evaluates.

    Args:
      args: ``run`` or ``config`` (with ``overrides``), ``data``, ``split``, ``base``.
      out: where to print.

    Returns:
      ``accuracy`` and, for an adapter, ``loss``; how many examples, and of what.
    """
    if (args.run is None) == (args.config is None):
        raise UserError(
            "eval takes either a CONFIG or --run DIR, and just one of them."
        )
    path = args.run or load_settings(args.config, args.overrides).output.dir
    folder, settings = open_run(path)
    source = (
        args.data or f"{settings.data.dataset or settings.data.train}, {args.split}"
    )
    rows = {} if args.data and not args.base else jobs.read_splits(settings.data)
    if args.data:
        rows["wanted"] = read_jsonl(args.data)
    elif args.split not in rows:
        raise UserError(
            f"the run has no {args.split} split; it has {', '.join(rows)}. "
            "--data FILE evaluates any other file."
        )
    else:
        rows["wanted"] = rows[args.split]

    adapter = load_adapter(folder / ADAPTER)
    job = jobs.build(settings, adapter.extra["labels"])
    names = ("train", "validation", "wanted") if args.base else ("wanted",)
    splits = {name: jobs.tokenize(job, rows[name], source=source) for name in names}
    count = len(splits["wanted"].examples)
    if args.base:
        splits["test"] = splits.pop("wanted")
        found = fit_baseline(job, splits, (), out)
        what, metrics = (
            "frozen base + linear head",
            {"accuracy": found["test_accuracy"], "l2": found["l2"]},
        )
    else:
        expected = {name: job.variables.get(name, {}) for name in TRAINABLE}
        adapter = load_adapter(
            folder / ADAPTER, expected=expected, fingerprint=job.fingerprint
        )
        variables = {FROZEN: job.variables[FROZEN], **adapter.variables}
        step = make_eval_step(jobs.classification_loss(job.adapted))
        batches = jobs.eval_batches(splits["wanted"])
        with out.progress("evaluate", batches.steps_per_epoch) as tick:
            stream = jobs.one_epoch(batches)
            shown = (tick(i, "batches") or x for i, x in enumerate(stream, start=1))
            measured = evaluate(step, variables, shown)
        what = f"adapter of step {adapter.extra['step']}"
        metrics = {"accuracy": measured["accuracy"], "loss": measured["loss"]}
    out.heading(f"{what} on {source}")
    facts = [("sentences", f"{count:,}"), ("accuracy", f"{metrics['accuracy']:.1%}")]
    if "loss" in metrics:
        facts.append(("loss", f"{metrics['loss']:.4f}"))
    out.facts(facts)
    return {
        **metrics,
        "examples": count,
        "data": source,
        "model": what,
        "run": str(folder.path),
    }
