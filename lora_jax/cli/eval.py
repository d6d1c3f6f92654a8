"""`lora-jax eval`: metrics of a run's adapter, or of its base, on a data file."""

import argparse
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.evaluation import evaluate_run
from lora_jax.finetune.formatting import metric_text
from lora_jax.finetune.run_folder import open_run
from lora_jax.finetune.settings import load_settings


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Evaluates a run; returns the metrics and what was evaluated."""
    if (args.run is None) == (args.config is None):
        raise UserError("eval takes either a CONFIG or --run DIR.")
    asked = None if args.run else load_settings(args.config, args.overrides)
    folder, settings = open_run(args.run if asked is None else asked.output.dir)
    if asked is not None:
        folder.check_settings(
            asked,
            f"Use --run {folder.path} to evaluate it with its own settings, and --data "
            "for another file.",
        )
    found = evaluate_run(
        folder,
        settings,
        data=args.data,
        split=args.split,
        is_base=args.base,
        reporter=out,
    )
    out.heading(f"{found.model} on {found.data}")
    facts = [("examples", f"{found.examples:,}")]
    facts += [(name, metric_text(name, v)) for name, v in found.metrics.items()]
    out.facts(facts + ([("devices", found.devices)] if found.devices else []))
    if found.adapters:
        metrics = next(iter(found.adapters.values()))
        rows = [
            (name, *(metric_text(k, v) for k, v in own.items()))
            for name, own in found.adapters.items()
        ]
        out.table(("adapter", *metrics), rows)
    return {
        **({"adapters": found.adapters} if found.adapters else {}),
        **found.metrics,
        "examples": found.examples,
        "data": found.data,
        "model": found.model,
        "run": str(folder.path),
    }
