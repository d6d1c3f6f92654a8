"""`lora-jax plan --topology`: a decoder's step on devices that need not be there.

Nothing but the model's ``config.json`` is read: no weights, no data.
"""

import argparse
import dataclasses
import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax.cli.console import Console
from lora_jax.files.fetch import find_model
from lora_jax.files.gguf import SUFFIX
from lora_jax.finetune.devices import mesh_rules
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import arithmetic, duration, size
from lora_jax.finetune.language import MAX_LENGTH
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.decoder import REMATS
from lora_jax.models.families import FAMILIES
from lora_jax.models.source import check_settings, read_settings
from lora_jax.names import DATA, FSDP
from lora_jax.parallel.mesh import AXES, make_mesh
from lora_jax.plan.fit import largest_batch, smallest_slice
from lora_jax.plan.slices import CHIPS, check_topology, open_slice
from lora_jax.plan.step import StepPlan, Workload, fitting_remat, plan_step


class Ahead(NamedTuple):
    """What is asked.

    Attributes:
      work: what is trained.
      topology: where.
      sizes: of the mesh's axes; one may be -1.
      batch: rows.
      out: where to print.
    """

    work: Workload
    topology: str
    sizes: dict[str, int]
    batch: int
    out: Console

    def price(self, topology: str, batch: int, remat: str) -> StepPlan:
        """Compiles a step; says that it does."""
        mesh = make_mesh(**self.sizes, devices=open_slice(topology))
        work = dataclasses.replace(self.work, remat=remat)
        limit = check_topology(topology).memory
        plan = plan_step(work, mesh, batch, limit=limit)
        self.out.say(f"  {_line(topology, plan)}")
        return plan


def run(settings: RunSettings, args: argparse.Namespace, out: Console) -> dict:
    """Plans a step ahead of time; one that does not fit is the user's error.

    Args:
      settings: of the run.
      args: ``topology``, ``mesh``, ``batch``, ``tokens``, ``largest_batch``,
        ``smallest_slice``.
      out: where to print.

    Returns:
      The plan as JSON values.

    Raises:
      ValueError: if the topology does not exist, or mesh or batch don't divide.
      UserError: if the step does not fit and nothing that would was asked for.
    """
    chip = check_topology(args.topology)
    work = workload(settings, args.tokens)
    batch = args.batch or settings.train.batch_size
    asked = Ahead(work, args.topology, read_mesh(args.mesh), batch, out)
    devices = open_slice(args.topology)
    mesh = make_mesh(**asked.sizes, devices=devices)
    axes = ", ".join(f"{name} {n}" for name, n in mesh.shape.items())
    out.heading(
        f"A training step of {batch} x {work.tokens} tokens, compiled for "
        f"{args.topology}: {len(devices)} chips of {size(chip.memory)} ({axes})"
    )
    plans = []
    policies = list(REMATS)
    for remat in policies[policies.index(work.remat) :]:
        plans.append(asked.price(args.topology, batch, remat))
        if plans[-1].fits:
            break
    plan = plans[-1]
    result: dict[str, Any] = {
        "topology": args.topology,
        "mesh": dict(mesh.shape),
        "step": describe(plan),
        "remat": fitting_remat(plans),
        "tried": [describe(other) for other in plans[:-1]],
    }
    _print_plan(out, plan)
    if not (plan.fits or args.largest_batch or args.smallest_slice):
        raise UserError(_too_large(asked, plan))
    if args.largest_batch:
        unit = _unit(work, mesh)
        found = largest_batch(
            lambda rows: asked.price(args.topology, rows, plan.remat), unit
        )
        largest = found and found.batch
        result["largest_batch"] = largest
        out.say(
            f"  largest batch: {largest} rows"
            if largest
            else f"  largest batch: not even {unit} rows fit"
        )
    if args.smallest_slice:
        kind = args.topology.partition(":")[0]
        smallest, tried = smallest_slice(
            lambda name: asked.price(name, batch, plan.remat),
            [name for name in _slices(kind) if _divides(asked, name)],
        )
        result["smallest_slice"] = smallest
        result["slices"] = {name: describe(other) for name, other in tried.items()}
        out.say(f"  smallest slice: {smallest or f'no {kind} slice tried fits'}")
    return result


def workload(settings: RunSettings, tokens: int | None) -> Workload:
    """Reads what is trained from settings and the model's config alone.

    Args:
      settings: of the run.
      tokens: of a row; None for ``data.max_length``.

    Returns:
      The workload.

    Raises:
      UserError: if the model is an encoder, or a row longer than its context.
    """
    found = find_model(settings.model.path)
    if found.suffix == SUFFIX:
        gguf = importlib.import_module("lora_jax.files.gguf")
        config_json = check_settings(gguf.GGUFReader(found).config, found)
    else:
        config_json = read_settings(found)
    family = FAMILIES[config_json["model_type"]]
    if family.head:
        raise UserError(
            f"--topology plans decoders; {found} is a {config_json['model_type']}, an "
            "encoder. Without --topology its step is compiled for this machine."
        )
    config = family.read_config(config_json)
    tokens = tokens or min(settings.data.max_length or MAX_LENGTH, config.max_positions)
    if tokens > config.max_positions:
        raise UserError(
            f"--tokens must be at most the model's context, {config.max_positions}; "
            f"got {tokens}."
        )
    stored = settings.model.param_dtype or config_json.get(
        "dtype", config_json.get("torch_dtype")
    )
    return Workload(
        config=config,
        lora=settings.lora,
        tokens=tokens,
        dtype=jnp.dtype(settings.model.dtype),
        param_dtype=jnp.dtype(stored or "float32"),
        remat=settings.model.remat,
        accumulate=settings.train.accumulate,
        scan_layers=settings.model.scan,
        rules=mesh_rules(settings),
        uneven=settings.mesh.uneven,
    )


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
    return {**dict.fromkeys(AXES, 1), DATA: 1, FSDP: -1 if is_open else 1, **sizes}


def describe(plan: StepPlan) -> dict[str, Any]:
    """Returns a plan as JSON values."""
    values = plan._asdict()
    flops = values.pop("flops")
    return {
        **values,
        "total": plan.total,
        "flops": {"lora": flops.lora, "full": flops.full, "saved": flops.saved},
    }


def _slices(kind: str) -> list[str]:
    return [f"{kind}:{shape}" for shape in CHIPS[kind].slices]


def _is_mesh(asked: Ahead, topology: str) -> bool:
    """Whether the mesh can be laid on a slice."""
    try:
        make_mesh(**asked.sizes, devices=open_slice(topology))
    except ValueError:
        return False
    return True


def _divides(asked: Ahead, topology: str) -> bool:
    """Whether mesh and batch divide over a slice, so that it can be tried."""
    if not _is_mesh(asked, topology):
        return False
    mesh = make_mesh(**asked.sizes, devices=open_slice(topology))
    return asked.batch % _unit(asked.work, mesh) == 0


def _unit(work: Workload, mesh: Mesh) -> int:
    """What a batch has to divide by."""
    return mesh.shape[DATA] * mesh.shape[FSDP] * work.accumulate


def _too_large(asked: Ahead, plan: StepPlan) -> str:
    """Words a step that does not fit, and the nearest slice that it fits."""
    names = _slices(asked.topology.partition(":")[0])
    larger = names[names.index(asked.topology) + 1 :]
    asked.out.say("  looking for a larger slice that it fits")

    def rows(name: str) -> int:  # the next batch that divides over a slice
        mesh = make_mesh(**asked.sizes, devices=open_slice(name))
        parts = _unit(asked.work, mesh)
        return -(-asked.batch // parts) * parts

    found, tried = smallest_slice(
        lambda name: asked.price(name, rows(name), plan.remat),
        [name for name in larger if _is_mesh(asked, name)],
    )
    way_out = (
        f"The nearest that it fits: --topology {found} --batch {tried[found].batch}, "
        f"{size(tried[found].total)} a chip."
        if found
        else "No larger slice of that chip fits either; take another chip, shorter "
        "rows (--tokens) or a mesh with tensor=2."
    )
    least = "" if plan.temporaries else "at least "  # weights alone, not compiled
    return (
        f"a step of {plan.batch} x {plan.tokens} tokens needs {least}"
        f"{size(plan.total)} a "
        f"chip of {asked.topology} with remat {plan.remat}; a chip has "
        f"{size(plan.limit)}. {way_out}"
    )


def _line(topology: str, plan: StepPlan) -> str:
    """Words one plan."""
    start = f"{topology}, {plan.batch} rows, remat {plan.remat}: "
    if plan.temporaries is None:
        return f"{start}weights alone take {size(plan.total)} a chip; does not fit"
    return (
        f"{start}{size(plan.total)} a chip, {'fits' if plan.fits else 'does not fit'} "
        f"(compiled in {duration(plan.compile_seconds)})"
    )


def _print_plan(out: Console, plan: StepPlan) -> None:
    temporaries = "-" if plan.temporaries is None else size(plan.temporaries)
    out.table(
        ("bytes a chip", ""),
        [
            ("frozen base", size(plan.base)),
            ("trained weights", size(plan.trained)),
            ("optimizer", size(plan.optimizer)),
            ("batch and padding", size(plan.other)),
            ("activations and temporaries", temporaries),
            ("in all", f"{size(plan.total)} of {size(plan.limit)}"),
            ("fits", "yes" if plan.fits else "no"),
        ],
    )
    flops = plan.flops
    out.say(
        f"  {arithmetic(flops.lora)} a step; full fine-tuning "
        f"{arithmetic(flops.full)}: LoRA saves {flops.saved:.0%} (by formula)"
    )
