"""`lora-jax plan`: what would be trained, and the cost of a step.

The step is the one `train` would run on this machine, or with ``--topology`` one on a
TPU slice that need not exist here, read only from the model's config.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune import report
from lora_jax.finetune.devices import check_batch
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import arithmetic, duration, size
from lora_jax.finetune.pricing import JobSteps, slice_steps, too_large
from lora_jax.finetune.settings import RunSettings, load_settings
from lora_jax.finetune.sweep_grid import Point
from lora_jax.finetune.sweep_group import MOST_PLANNED, Group
from lora_jax.finetune.tasks import open_job
from lora_jax.names import FSDP
from lora_jax.parallel.mesh import AXES, MORE_AXES
from lora_jax.plan.fit import Price, first_fitting, fitting_remat, largest_batch
from lora_jax.plan.flops import StepFlops
from lora_jax.plan.slices import chips_of, slices_like
from lora_jax.plan.step import StepPlan
from lora_jax.plan.topology import DecoderSteps

PARTS = {
    "frozen base": "base",
    "trained weights": "trained",
    "optimizer": "optimizer",
    "batch and padding": "other",
    "activations and temporaries": "temporaries",
    "total memory": "total",
}
TARGET = ("path", "kind", "kernel_shape", "rank", "alpha", "scaling", "trainable")


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Compiles a training step; reports its cost, whether it fits, and what would.

    Raises:
      ValueError: if the topology does not exist, or mesh or batch are not divisible.
      UserError: if the step does not fit and no alternative was requested.
    """
    settings = load_settings(args.config, args.overrides)
    plan = _plan_local if args.topology is None else _plan_slice
    return plan(settings, args, out)


def _plan_local(
    settings: RunSettings, args: argparse.Namespace, out: Console
) -> dict[str, Any]:
    """Plans a job's step on this machine, compared with full fine-tuning."""
    options = ("batch", "tokens", "mesh", "smallest_slice")
    if given := [name for name in options if getattr(args, name)]:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"{shown} requires --topology, e.g. v5e:4x4. On this machine the step is "
            "set by train.batch_size and data.max_length."
        )
    job = open_job(settings, splits=["train"], is_strict=False)
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
    price = _printed(steps.price, "this machine", out)
    plan = fitting_remat(price, rows, steps.remat)[-1]
    unit = settings.train.accumulate * job.devices.parts
    _check_fits(plan, "this machine", lambda: steps.suggestion(plan, price), args)
    full = steps.price(rows, plan.remat, trains_all=True)
    flops = steps.flops(plan, full)
    _print_plans(out, {"LoRA": plan, "full fine-tuning": full}, flops)
    out.say(f"  {_verdict(plan, 'this machine', settings)}")
    together = None
    if args.together:
        runs = Group([Point("", {}, settings)], out, job=job)
        many, most = runs.plan_most(args.together, plan.remat)
        together = {"runs": args.together, **many.parts, "largest": most}
        is_tried = most >= max(MOST_PLANNED, args.together)
        room = f"{most} or more fit" if is_tried else f"at most {most} fit"
        out.say(
            f"  {args.together} runs side by side need {size(many.total)}; {room} this "
            "machine"
        )
    return {
        "targets": [
            {name: getattr(target, name) for name in TARGET} for target in job.targets
        ],
        "token_rows": [
            {"path": rows.path, "tokens": list(rows.tokens), "width": rows.shape[1]}
            for rows in job.adapted.token_rows(job.loaded.params)
        ],
        "frozen_notes": job.frozen_notes,
        "parameters": counts,
        "shape": {"batch": rows, "tokens": tokens},
        "steps": {"total": steps.total, "per_epoch": steps.batches.steps_per_epoch},
        "step": {
            "lora": {**plan.parts, "flops": flops.lora},
            "full": {**full.parts, "flops": flops.full},
        },
        "limit": plan.limit,
        "remat": plan.remat if plan.fits else None,
        "largest_batch": _largest(price, plan, unit, args, out),
        "together": together,
        "device": report.device(),
    }


def _plan_slice(
    settings: RunSettings, args: argparse.Namespace, out: Console
) -> dict[str, Any]:
    """Plans a step on a TPU slice."""
    topology, mesh = args.topology, read_mesh(args.mesh)
    steps = slice_steps(settings, topology, mesh, args.tokens)
    rows = args.batch or settings.train.batch_size
    if args.together:
        return _plan_sweep(steps, rows, args, out)
    sizes = steps.sharding.mesh.shape
    out.heading(
        f"A training step of {rows} x {steps.tokens} tokens, compiled for {topology}: "
        f"{chips_of(topology)} chips of {size(steps.limit)} "
        f"({', '.join(f'{name} {n}' for name, n in sizes.items())})"
    )
    price, remat = _printed(steps.price, topology, out), steps.decoder.remat
    *before, plan = fitting_remat(price, rows, remat)
    _print_plans(out, {"LoRA": plan}, steps.flops(plan))
    chip = f"a {topology.partition(':')[0]} chip"
    out.say(f"  {_verdict(plan, chip, settings)}")

    def first_slice(
        is_asked: Callable[[str, int], bool],
    ) -> tuple[str | None, dict[str, StepPlan]]:
        """Finds the smallest of the named slices, with its smallest batch."""
        found = {}
        for name in slices_like(topology):
            with contextlib.suppress(ValueError):  # its chips are not divisible
                other = slice_steps(settings, name, mesh, args.tokens)
                if is_asked(name, least := other.rows(rows)):
                    found[name] = _printed(other.price, name, out), least

        def price(name: str) -> StepPlan:
            price, least = found[name]
            return price(least, plan.remat)

        return first_fitting(price, found)

    def suggestion() -> str:
        out.say("  searching for a larger slice that fits")
        own = chips_of(topology)
        found, tried = first_slice(lambda name, least: chips_of(name) > own)
        if found:
            return (
                f"The nearest that fits: --topology {found} --batch "
                f"{tried[found].batch}, {size(tried[found].total)} per chip."
            )
        return (
            "No larger slice of that chip fits either; use another chip, shorter rows "
            "(--tokens) or a mesh with tensor=2."
        )

    def describe(plan: StepPlan) -> dict[str, Any]:
        flops = steps.flops(plan)
        flops = {**flops._asdict(), "saved": flops.saved}
        return {**plan._asdict(), "total": plan.total, "flops": flops}

    _check_fits(plan, chip, suggestion, args)
    result = {
        "topology": topology,
        "mesh": dict(sizes),
        "step": describe(plan),
        "remat": plan.remat if plan.fits else None,
        "tried": [describe(other) for other in before],
        "largest_batch": _largest(price, plan, steps.rows(), args, out),
    }
    if args.smallest_slice:
        smallest, tried = first_slice(lambda name, least: least == rows)
        result["smallest_slice"] = smallest
        result["slices"] = {name: describe(other) for name, other in tried.items()}
        out.say(f"  smallest slice: {smallest or 'no slice of that chip fits'}")
    return result


def _plan_sweep(
    steps: DecoderSteps, rows: int, args: argparse.Namespace, out: Console
) -> dict[str, Any]:
    """Plans the step of a sweep whose runs are split over a slice's chips."""
    chips, topology = chips_of(args.topology), args.topology
    each = -(-args.together // chips)
    out.heading(
        f"A training step of {args.together} runs of {rows} x {steps.tokens} tokens, "
        f"{each} on each of {topology}'s {chips} chips of {size(steps.limit)}"
    )

    def together(rows: int, remat: str | None) -> StepPlan:
        return steps.price_together(each, rows, remat)

    price = _printed(together, topology, out)
    *_, plan = fitting_remat(price, rows, steps.decoder.remat)
    _print_plans(out, {f"{each} runs": plan}, StepFlops(0, 0))
    chip = f"a {topology.partition(':')[0]} chip"
    advice = "Use a larger slice, fewer runs (--together) or fewer rows (--batch)."
    _check_fits(plan, chip, lambda: advice, args)
    return {
        "topology": topology,
        "together": {"runs": args.together, "each": each, **plan.parts},
        "remat": plan.remat,
    }


def read_mesh(text: str | None) -> dict[str, int]:
    """Parses ``data=1,fsdp=16``; missing axes are 1, but ``fsdp`` -1, the rest.

    Raises:
      UserError: if it can't be parsed.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        name, _, number = part.partition("=")
        is_number = number.removeprefix("-").isdecimal()
        axes = (*AXES, *MORE_AXES)
        if name not in axes or name in sizes or not is_number:
            raise UserError(
                f"--mesh must be like data=1,fsdp=-1,tensor=2, with each axis of "
                f"{', '.join(axes)} at most once; got {part!r} in {text!r}."
            )
        sizes[name] = int(number)
    is_open = FSDP not in sizes and -1 not in sizes.values()
    return {**dict.fromkeys(AXES, 1), FSDP: -1 if is_open else 1, **sizes}


def _printed(price: Price, place: str, out: Console) -> Price:
    """Wraps ``price`` to print a line for each plan."""

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
    """Prints the memory of steps side by side, and the FLOPs that LoRA saves."""
    rows = []
    for label, part in PARTS.items():
        values = [plan.parts[part] for plan in plans.values()]
        rows.append([label, *("-" if n is None else size(n) for n in values)])
        if len(values) > 1:
            lora, full = values
            rows[-1].append(f"{lora / full:.2f}" if lora and full else "-")
    out.table(("bytes per device", *plans, "ratio")[: len(rows[0])], rows)
    (plan, *_), saved = plans.values(), ""
    if flops.lora and flops.full:
        saved = (
            f"{arithmetic(flops.lora)} per step, full fine-tuning "
            f"{arithmetic(flops.full)}: LoRA saves {flops.saved:.0%} "
            f"({'by formula' if plan.remat else 'as traced'}); "
        )
    out.say(f"  {saved}memory as XLA counts it for the compiled step")


def _verdict(plan: StepPlan, device: str, settings: RunSettings) -> str:
    """Describes whether a step fits, and with which policy."""
    policy = _policy(", with ", plan.remat)
    if plan.fits and plan.remat and settings.model.remat not in ("auto", plan.remat):
        policy += f": set model.remat={plan.remat}"
    verb = "fits" if plan.fits else "does not fit"
    return f"{verb} {device}'s {size(plan.limit)}{policy}"


def _check_fits(
    plan: StepPlan, device: str, suggestion: Callable[[], str], args: argparse.Namespace
) -> None:
    """Raises if a step does not fit and no alternative was requested."""
    if plan.fits or args.largest_batch or args.smallest_slice:
        return
    raise too_large(plan, device, suggestion())


def _largest(
    price: Price, plan: StepPlan, unit: int, args: argparse.Namespace, out: Console
) -> int | None:
    """Finds and prints the largest batch with a plan's policy, if requested."""
    if not args.largest_batch:
        return None
    found = largest_batch(lambda rows: price(rows, plan.remat), unit)
    text = f"{found.batch} rows" if found else f"not even {unit} rows"
    out.say(f"  largest batch that fits: {text} of {plan.tokens} tokens")
    return found and found.batch


def _policy(start: str, remat: str | None) -> str:
    """Formats a policy, if there is one."""
    return f"{start}remat {remat}" if remat else ""
