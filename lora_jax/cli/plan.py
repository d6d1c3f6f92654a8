"""`lora-jax plan`: what would be trained, and what a step costs, beforehand."""

import argparse
from typing import Any

from lora_jax.cli import plan_topology
from lora_jax.cli.console import Console
from lora_jax.cli.plan_local import Pricer
from lora_jax.finetune import job as jobs
from lora_jax.finetune import report
from lora_jax.finetune.devices import check_batch
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import arithmetic, size
from lora_jax.finetune.settings import load_settings
from lora_jax.finetune.tasks import open_job


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Compiles a LoRA step and a full fine-tuning step, compares them; says what fits.

    Args:
      args: ``config`` and ``overrides``; with ``topology``, see `plan_ahead`.
      out: where to print.

    Returns:
      Targets, counts, and for each of the two the bytes and FLOPs of a step.
    """
    settings = load_settings(args.config, args.overrides)
    if args.topology is not None:
        return plan_topology.run(settings, args, out)
    _refuse_ahead(args)
    job = open_job(settings, splits=["train"], is_strict=False)
    check_batch(settings, job.devices)
    batches = job.batches()
    report.print_loaded(out, job, batches)
    numbers = report.counts(job)
    notes = [("devices", job.devices.note)] if job.devices.note else []
    out.facts([("trained", report.trained_text(numbers)), *notes])

    total = jobs.total_steps(settings.train, batches.steps_per_epoch)
    longest = max(
        (batches.batch_at(i) for i in range(min(total, batches.steps_per_epoch))),
        key=lambda batch: batch["input_ids"].shape[1],
    )
    b, t = longest["input_ids"].shape
    out.heading(
        f"A training step of {b} x {t} tokens, the longest shape ({report.device()})"
    )
    pricer = Pricer(job, total, longest)
    plan = pricer.fitting(out)
    full = pricer.full(b)
    flops = pricer.flops(b, plan.remat)
    steps = {
        "lora": {**plan.parts, "flops": flops.lora if flops else plan.flops},
        "full": {**full.parts, "flops": flops.full if flops else full.flops},
    }
    _print_steps(out, steps)
    policy = f", with remat {plan.remat}" if plan.remat else ""
    out.say(f"  fits this machine's {size(plan.limit)}{policy}")
    largest = None
    if args.largest_batch:
        found = pricer.largest(plan.remat)
        largest = found and found.batch
        out.say(f"  largest batch that fits: {largest} rows of {t} tokens")
    return {
        "targets": [
            {
                "path": target.path,
                "kind": target.kind,
                "kernel_shape": list(target.kernel_shape),
                "rank": target.rank,
                "alpha": target.alpha,
                "scaling": target.scaling,
                "trainable": target.trainable,
            }
            for target in job.targets
        ],
        "parameters": numbers,
        "shape": {"batch": b, "tokens": t},
        "steps": {"total": total, "per_epoch": batches.steps_per_epoch},
        "step": steps,
        "limit": plan.limit,
        "remat": plan.remat,
        "largest_batch": largest,
        "device": report.device(),
    }


def _refuse_ahead(args: argparse.Namespace) -> None:
    """Raises if options that need a topology were given without one."""
    options = ("batch", "tokens", "mesh", "smallest_slice")
    given = [name for name in options if getattr(args, name)]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"{shown} must come with --topology, v5e:4x4 say. On this machine the "
            "step is that of the data: train.batch_size, data.max_length."
        )


def _print_steps(out: Console, steps: dict[str, dict[str, Any]]) -> None:
    rows = []
    for label, key in (
        ("frozen base", "base"),
        ("trained weights", "trained"),
        ("optimizer", "optimizer"),
        ("activations and temporaries", "temporaries"),
        ("memory in all", "total"),
    ):
        lora, full = steps["lora"][key], steps["full"][key]
        rows.append((label, size(lora), size(full), _ratio(lora, full)))
    lora, full = steps["lora"]["flops"], steps["full"]["flops"]
    if lora and full:
        rows.append(
            ("arithmetic", arithmetic(lora), arithmetic(full), _ratio(lora, full))
        )
    out.table(("", "LoRA", "full fine-tuning", "ratio"), rows)
    saved = f"; LoRA saves {1 - lora / full:.0%} of the arithmetic" if lora else ""
    out.say(f"  (memory as XLA counts it for the compiled step{saved})")


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "-"
