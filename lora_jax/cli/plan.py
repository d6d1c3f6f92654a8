"""`lora-jax plan`: what would be trained, and what a step costs, beforehand.

The step is that of the data on this machine, or with ``--topology`` a decoder's on a
TPU slice that need not be there: then nothing but the model's config is read.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax.cli.console import Console
from lora_jax.finetune import job as jobs
from lora_jax.finetune import report
from lora_jax.finetune.devices import check_batch
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import arithmetic, duration, size
from lora_jax.finetune.pricing import JobSteps, workload
from lora_jax.finetune.settings import RunSettings, load_settings
from lora_jax.names import FSDP
from lora_jax.parallel.mesh import AXES
from lora_jax.plan.fit import Price, first_fitting, fitting_remat, largest_batch
from lora_jax.plan.flops import StepFlops
from lora_jax.plan.slices import check_topology, chips_of
from lora_jax.plan.step import StepPlan
from lora_jax.plan.topology import SliceSteps

PARTS = {
    "frozen base": "base",
    "trained weights": "trained",
    "optimizer": "optimizer",
    "batch and padding": "other",
    "activations and temporaries": "temporaries",
    "memory in all": "total",
}


class _Asked(NamedTuple):
    """How steps are priced.

    Attributes:
      price: of a number of rows and a remat policy; prints a line.
      unit: rows that every batch has to divide by.
      remat: of the settings, what the backward pass computes again.
      device: what has to have the memory, in words.
    """

    price: Price
    unit: int
    remat: str | None
    device: str

    def largest(self, remat: str | None) -> StepPlan | None:
        """Returns the largest batch that fits under a policy."""
        return largest_batch(lambda rows: self.price(rows, remat), self.unit)


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Compiles a training step; says what it needs, whether it fits, and what would.

    Args:
      args: ``config``, ``overrides`` and ``largest_batch``; ``topology`` and, only
        with it, ``mesh``, ``batch``, ``tokens``, ``smallest_slice``.
      out: where to print.

    Returns:
      The plan as JSON values.

    Raises:
      ValueError: if the topology does not exist, or mesh or batch don't divide.
      UserError: if the step does not fit and nothing that would was asked for.
    """
    settings = load_settings(args.config, args.overrides)
    plan = _plan_local if args.topology is None else _plan_slice
    return plan(settings, args, out)


def _plan_local(
    settings: RunSettings, args: argparse.Namespace, out: Console
) -> dict[str, Any]:
    """Plans a job's step on this machine, beside that of full fine-tuning."""
    options = ("batch", "tokens", "mesh", "smallest_slice")
    if given := [name for name in options if getattr(args, name)]:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"{shown} must come with --topology, v5e:4x4 say. On this machine the "
            "step is that of the data: train.batch_size, data.max_length."
        )
    job = jobs.open_job(settings, splits=["train"], is_strict=False)
    check_batch(settings, job.devices)
    steps = JobSteps(job)
    report.print_loaded(out, job, steps.batches)
    counts = report.counts(job)
    notes = [("devices", job.devices.note)] if job.devices.note else []
    out.facts([("trained", report.trained_text(counts)), *notes])
    rows, tokens = steps.longest["input_ids"].shape
    out.heading(
        f"A training step of {rows} x {tokens} tokens, the longest shape "
        f"({report.device()})"
    )
    asked = _Asked(
        price=_printed(steps.price, "this machine", out),
        unit=settings.train.accumulate * job.devices.parts,
        remat=steps.remat,
        device="this machine",
    )
    plan = fitting_remat(asked.price, rows, steps.remat)[-1]
    full = steps.price(rows, plan.remat, trains_all=True)
    flops = steps.flops(plan, full)
    _print_plans(out, {"LoRA": plan, "full fine-tuning": full}, flops)

    def way_out() -> str:
        found = asked.largest(plan.remat)
        if found is None:
            return (
                "Not even the smallest batch fits: take shorter rows "
                "(data.max_length) or model.param_dtype=bfloat16."
            )
        return (
            f"The largest batch that fits is train.batch_size={found.batch}: "
            f"{size(found.total)}."
        )

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
        "parameters": counts,
        "shape": {"batch": rows, "tokens": tokens},
        "steps": {"total": steps.total, "per_epoch": steps.batches.steps_per_epoch},
        "step": {
            "lora": {**plan.parts, "flops": flops.lora},
            "full": {**full.parts, "flops": flops.full},
        },
        "limit": plan.limit,
        **_conclude(asked, plan, way_out, args, out),
        "device": report.device(),
    }


def _plan_slice(
    settings: RunSettings, args: argparse.Namespace, out: Console
) -> dict[str, Any]:
    """Plans a decoder's step on a TPU slice."""
    chip, work = check_topology(args.topology), workload(settings, args.tokens)
    steps = SliceSteps(work, args.topology, read_mesh(args.mesh))
    rows = args.batch or settings.train.batch_size
    axes = ", ".join(f"{name} {n}" for name, n in steps.mesh.shape.items())
    out.heading(
        f"A training step of {rows} x {work.tokens} tokens, compiled for "
        f"{args.topology}: {steps.mesh.size} chips of {size(chip.memory)} ({axes})"
    )
    kind = args.topology.partition(":")[0]
    asked = _Asked(
        price=_printed(steps.price, args.topology, out),
        unit=steps.rows(),
        remat=work.remat,
        device=f"a {kind} chip",
    )
    *before, plan = fitting_remat(asked.price, rows, work.remat)
    _print_plans(out, {"LoRA": plan}, steps.flops(plan))

    def first_slice(
        is_asked: Callable[[str, int], bool],
    ) -> tuple[str | None, dict[str, StepPlan]]:
        siblings = steps.siblings(rows)

        def price(name: str) -> StepPlan:
            steps, least = siblings[name]
            return _printed(steps.price, name, out)(least, plan.remat)

        return first_fitting(
            price,
            [name for name, (_, least) in siblings.items() if is_asked(name, least)],
        )

    def way_out() -> str:
        out.say("  looking for a larger slice that it fits")
        own = chips_of(args.topology)
        found, tried = first_slice(lambda name, least: chips_of(name) > own)
        if found is None:
            return (
                "No larger slice of that chip fits either; take another chip, shorter "
                "rows (--tokens) or a mesh with tensor=2."
            )
        return (
            f"The nearest that it fits: --topology {found} --batch "
            f"{tried[found].batch}, {size(tried[found].total)} a chip."
        )

    def describe(plan: StepPlan) -> dict[str, Any]:
        flops = steps.flops(plan)
        return {
            **plan._asdict(),
            "total": plan.total,
            "flops": {**flops._asdict(), "saved": flops.saved},
        }

    result = {
        "topology": args.topology,
        "mesh": dict(steps.mesh.shape),
        "step": describe(plan),
        "tried": [describe(other) for other in before],
        **_conclude(asked, plan, way_out, args, out),
    }
    if args.smallest_slice:
        smallest, tried = first_slice(lambda name, least: least == rows)
        result["smallest_slice"] = smallest
        result["slices"] = {name: describe(other) for name, other in tried.items()}
        out.say(f"  smallest slice: {smallest or f'no {kind} slice tried fits'}")
    return result


def read_mesh(text: str | None) -> dict[str, int]:
    """Reads ``data=1,fsdp=16``; what isn't named is 1, ``fsdp`` the rest.

    Args:
      text: of the option, or None.

    Returns:
      A size for each axis; that of one may be -1.

    Raises:
      UserError: if it can't be read.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        name, _, number = part.partition("=")
        if (
            name not in AXES
            or name in sizes
            or not number.removeprefix("-").isdecimal()
        ):
            raise UserError(
                f"--mesh must be like data=1,fsdp=-1,tensor=2, each axis of "
                f"{', '.join(AXES)} once at most; got {part!r} in {text!r}."
            )
        sizes[name] = int(number)
    is_open = FSDP not in sizes and -1 not in sizes.values()
    return {**dict.fromkeys(AXES, 1), FSDP: -1 if is_open else 1, **sizes}


def _printed(price: Price, place: str, out: Console) -> Price:
    """Prints a line for each price."""

    def priced(rows: int, remat: str | None) -> StepPlan:
        plan = price(rows, remat)
        needed = f"{size(plan.total)} of {size(plan.limit)}"
        if plan.temporaries is None:
            text = f"weights alone take {needed}, does not fit"
        else:
            verdict = "fits" if plan.fits else "does not fit"
            seconds = duration(plan.compile_seconds)
            text = f"{needed}, {verdict} (compiled in {seconds})"
        out.say(f"  {place}, {rows} rows{_policy(', ', remat)}: {text}")
        return plan

    return priced


def _print_plans(out: Console, plans: dict[str, StepPlan], flops: StepFlops) -> None:
    """Prints what steps need, side by side, and what LoRA saves of the arithmetic."""
    rows = []
    for label, part in PARTS.items():
        values = [plan.parts[part] for plan in plans.values()]
        shown = ["-" if value is None else size(value) for value in values]
        rows.append([label, *shown])
        if len(values) > 1:
            lora, full = values
            rows[-1].append(f"{lora / full:.2f}" if lora and full else "-")
    ratio = ["ratio"] if len(plans) > 1 else []
    rows.append(
        [
            "fits",
            *(("no", "yes")[p.fits] for p in plans.values()),
            *([""] if ratio else []),
        ]
    )
    out.table(("bytes a device", *plans, *ratio), rows)
    saved = ""
    if flops.lora and flops.full:
        saved = (
            f"{arithmetic(flops.lora)} a step; full fine-tuning "
            f"{arithmetic(flops.full)}: LoRA saves {flops.saved:.0%} "
        )
    out.say(f"  {saved}(memory as XLA counts it for the compiled step)")


def _conclude(
    asked: _Asked,
    plan: StepPlan,
    way_out: Callable[[], str],
    args: argparse.Namespace,
    out: Console,
) -> dict[str, Any]:
    """Says whether a step fits, and finds the largest batch where that is asked for.

    Raises:
      UserError: if the step does not fit, and nothing that would was asked for.
    """
    policy = _policy(", with ", plan.remat)
    if plan.fits and plan.remat != asked.remat:
        policy += f": set model.remat={plan.remat}"
    verdict = "fits" if plan.fits else "does not fit"
    out.say(f"  {verdict} {asked.device}'s {size(plan.limit)}{policy}")
    if not (plan.fits or args.largest_batch or args.smallest_slice):
        least = "" if plan.temporaries else "at least "  # weights alone, not compiled
        each = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
        raise UserError(
            f"a step of {plan.batch} x {plan.tokens} tokens needs {least}"
            f"{size(plan.total)}{each}{_policy(' with ', plan.remat)}; {asked.device} "
            f"has {size(plan.limit)}. {way_out()}"
        )
    largest = None
    if args.largest_batch:
        found = asked.largest(plan.remat)
        largest = found and found.batch
        text = f"{largest} rows" if found else f"not even {asked.unit} rows fit"
        out.say(f"  largest batch that fits: {text} of {plan.tokens} tokens")
    return {"remat": plan.remat if plan.fits else None, "largest_batch": largest}


def _policy(start: str, remat: str | None) -> str:
    """Words a policy, where there is one."""
    return f"{start}remat {remat}" if remat else ""
