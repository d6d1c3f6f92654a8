"""`lora-jax sweep`: fine-tunes all combinations of settings, many runs in one step."""

import argparse
import shlex
from typing import Any

from lora_jax.cli import huge_pages
from lora_jax.cli.console import Console
from lora_jax.cli.train import shortest
from lora_jax.finetune.errors import Interrupted, UserError
from lora_jax.finetune.formatting import count_of, metric_text
from lora_jax.finetune.sweep import Sweep, sweep
from lora_jax.finetune.sweep_folder import BEST


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Sweeps.

    Args:
      args: ``config``, ``grid``, ``zip``, ``together``, ``resume``, ``overwrite``.
      out: where to print.

    Returns:
      The runs, the best first.
    """
    huge_pages.keep_freed()
    words = ["lora-jax", "sweep", args.config, *args.grid, *["--zip"] * args.zip]
    words += ["--together", str(args.together)] if args.together else []
    out.resume = shlex.join([*words, "--resume"])
    try:
        done = sweep(
            args.config,
            args.grid,
            zipped=args.zip,
            together=args.together,
            resume=args.resume,
            overwrite=args.overwrite,
            reporter=out,
        )
    except Interrupted as stop:
        raise UserError(str(stop), code=130) from None
    _print_result(out, done)
    return {
        **done._asdict(),
        "path": str(done.path),
        "plot": done.plot and str(done.plot),
    }


def _print_result(out: Console, done: Sweep) -> None:
    """Prints the runs, the best first, and the commands to try next."""
    settings = list(done.runs[0]["values"])
    rows = []
    for line in done.runs:
        validation, test = line["validation"] or {}, line["test"] or {}
        shown = (
            metric_text(done.metric, x.get(done.metric)) for x in (validation, test)
        )
        step = validation.get("step", line["status"])
        rows.append((*line["values"].values(), *shown, step, line["name"][:3]))
    order = ", the best first" * (len(rows) > 1)
    out.heading(f"{count_of(rows)}{order}")
    columns = [key.partition(".")[2] for key in settings]
    out.table((*columns, f"validation {done.metric}", "test", "step", "run"), rows)
    undrawn = 'not drawn: `pip install "lora_jax[experiments]"` has matplotlib'
    out.facts([("folder", str(done.path)), ("plot", str(done.plot or undrawn))])
    if done.runs[0]["status"] == "done":
        out.heading("Next")
        folder = shortest(done.path / BEST)
        split = "" if done.runs[0]["test"] else " --split validation"
        out.say(f"  lora-jax eval --run {folder}{split}")
        out.say(f"  lora-jax inspect {folder}")
        out.say(f"  lora-jax merge --adapter {folder} --out {folder}-merged")
