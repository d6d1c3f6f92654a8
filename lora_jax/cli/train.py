"""`lora-jax train`: fine-tunes a model as configured."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune.errors import Interrupted, UserError
from lora_jax.finetune.formatting import duration, metric_text, size
from lora_jax.finetune.run import Run, fine_tune
from lora_jax.interop.adapter_folder import RUN_ADAPTERS
from lora_jax.parallel.processes import is_first, shut_down, start

SHOWN = 20  # adapters, of a run with several


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Trains a model; returns the contents of summary.json."""
    join(args, out)
    out.resume = _resume_command(args)
    try:
        done = fine_tune(
            args.config,
            args.overrides,
            resume=args.resume,
            overwrite=args.overwrite,
            reporter=out,
        )
    except Interrupted as stop:
        if stop.is_orderly:
            shut_down()
        raise UserError(str(stop), code=130) from None
    _print_result(out, done)
    shut_down()
    return done.summary


def join(args: argparse.Namespace, out: Console) -> None:
    """Joins a multi-process job if requested; mutes all processes but the first.

    Args:
      args: ``coordinator``, ``processes``, ``process_id``, or ``distributed`` to detect
        them from the cluster; ``start_timeout`` in seconds.
      out: the console of this process.

    Raises:
      UserError: if the options are incompatible.
      ValueError: if a number is out of range, or no cluster is found.
      OSError: if the coordinator can't be reached.
    """
    own = {
        "--coordinator": args.coordinator,
        "--processes": args.processes,
        "--process-id": args.process_id,
    }
    given = [name for name, value in own.items() if value is not None]
    if args.distributed and given:
        raise UserError(
            f"--distributed detects {', '.join(given)} from the cluster; use one or "
            "the other."
        )
    if given and len(given) < len(own):
        missing = ", ".join(name for name in own if name not in given)
        raise UserError(
            f"{', '.join(given)} must come with {missing}; --distributed detects all "
            "three from SLURM, Kubernetes, Open MPI or the TPU pod."
        )
    if given:
        out.say(
            f"Process {args.process_id} of {args.processes} is waiting for the others "
            f"at {args.coordinator}, for up to {args.start_timeout} s"
        )
    if given or args.distributed:
        start(*own.values(), timeout=args.start_timeout)
        if not is_first():
            out.mute()


def shortest(path: str | Path) -> str:
    """Returns a path relative to the working directory if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _resume_command(args: argparse.Namespace) -> str:
    words = ["lora-jax", "train", args.config, *args.overrides, "--resume"]
    words += ["--distributed"] * args.distributed
    if args.coordinator is not None:
        words += ["--coordinator", args.coordinator]
        words += ["--processes", str(args.processes)]
        words += ["--process-id", str(args.process_id)]
    return shlex.join(words)


def _print_result(out: Console, done: Run) -> None:
    """Prints a run's summary and the commands to try next."""
    summary = done.summary
    base, test, best = summary["baseline"], summary["test"], summary["validation"]
    metric, rows = summary["metric"], []
    if base:
        values = (base[f"validation_{metric}"], base[f"test_{metric}"])
        rows.append((base["what"], *(metric_text(metric, v) for v in values)))
    each = summary.get("adapters", {})
    values = (best[metric], test and test[metric])
    name = f"LoRA, adapter of step {best['step']}"
    if each:
        name = f"LoRA, {len(each)} adapters, each at its best step"
    rows.append((name, *(metric_text(metric, v) for v in values)))
    for name, own in [*each.items()][:SHOWN]:
        values = [(own[k] or {}).get(metric) for k in ("validation", "test")]
        rows.append((f"  {name}", *(metric_text(metric, v) for v in values)))
    if len(each) > SHOWN:
        rows.append((f"  and {len(each) - SHOWN} more, see summary.json", "", ""))
    out.heading("Result")
    out.table((metric, "validation", "test"), rows)
    adapter, model = summary["adapter_bytes"], summary["model_bytes"]
    share = f"{size(adapter)}, {adapter / model:.1%} of the model's {size(model)}"
    spent = dict(summary["seconds"])
    total = duration(spent.pop("total"))
    phases = ", ".join(f"{name} {duration(each)}" for name, each in spent.items())
    undrawn = 'not drawn; matplotlib is in `pip install "lora_jax[experiments]"`'
    out.facts(
        [
            ("adapter", share),
            ("time", f"{total} in total: {phases}"),
            ("run folder", str(done.path)),
            ("curves", summary["files"]["curves"] or undrawn),
        ]
    )
    folder = run = shortest(done.path)
    out.heading("Next")
    split = "" if test else " --split validation"
    out.say(f"  lora-jax eval --run {run}{split}")
    if each:
        first = next(name for name, own in each.items() if own["validation"])
        out.say(f"  lora-jax export --adapter {run} --portable --out {run}-peft")
        folder, run = f"{run}/{RUN_ADAPTERS}/{first}", f"{run}-{first}"
    if done.prompt:
        chat = "--chat " if done.prompt == "chat" else ""
        out.say(f"  lora-jax generate --adapter {folder} {chat}--prompt TEXT")
    out.say(f"  lora-jax inspect {folder}")
    if not summary["warning"]:
        out.say(f"  lora-jax merge --adapter {folder} --out {run}-merged")
