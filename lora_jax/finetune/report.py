"""Reports of a training run: the loaded model, the plan and the result."""

import contextlib
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax.files.adapter import TENSORS
from lora_jax.finetune.formatting import size
from lora_jax.finetune.job import Job
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import ADAPTER, ADAPTERS, CURVES, RunFolder
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.stacking import LayerSlice, layer_slices
from lora_jax.names import CLASSIFIER, FROZEN, LORA, PARAMS
from lora_jax.plan.step import StepPlan
from lora_jax.train.buckets import Schedule
from lora_jax.train.state import TrainState
from lora_jax.tree.partition import count
from lora_jax.tree.targets import Target
from lora_jax.tree.token_rows import TokenRows

LONG = 12


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all leaves (arrays, keys, or shapes with a dtype)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def loaded_facts(job: Job) -> list[tuple[str, str]]:
    """Describes the loaded model, with new and unused parameters."""
    config, loaded = job.loaded.config, job.loaded
    layers = str(config.num_layers)
    if loaded.family.has_source:
        layers += f" + {config.num_decoder_layers}"
    facts = [
        (
            "model",
            f"{type(loaded.module).__name__}, {layers} layers, "
            f"d {config.hidden_size}, {config.num_heads} heads, MLP {config.mlp_size}, "
            f"vocabulary {config.vocab_size:,}",
        ),
        ("from", str(loaded.path)),
        (
            "weights",
            f"{count(loaded.params):,} parameters, {size(tree_bytes(loaded.params))}, "
            f"fingerprint {job.fingerprint}",
        ),
    ]
    if loaded.new:
        facts.append(("new", ", ".join(loaded.new)))
    if loaded.unused:
        facts.append(("not used", loaded.unused_text()))
    return facts


def print_loaded(out: Reporter, job: Job, batches: Schedule) -> None:
    """Prints model, data and adapted layers."""
    out.heading("Loaded")
    out.facts([*loaded_facts(job), *job.data_facts(batches), *adapter_facts(job)])
    out.heading(f"Adapted layers ({layer_count(job.targets)})")
    columns = ("layer", "count", "kind", "kernel", "rank", "alpha", "trained")
    tokens = token_table(job.adapted.token_rows(job.loaded.params))
    out.table(columns, [*target_rows(job.targets), *tokens])
    for note in job.frozen_notes:
        out.say(f"  {note}", style="yellow")


def adapter_facts(job: Job) -> list[tuple[str, str]]:
    """Names the adapters of a run that trains several."""
    if not job.adapters:
        return []
    shown = ", ".join(job.adapters[:LONG]) + (", ..." * (len(job.adapters) > LONG))
    return [("adapters", f"{len(job.adapters):,}, one for each name: {shown}")]


def print_plan(
    out: Reporter, job: Job, plan: StepPlan, numbers: dict[str, Any], steps: str
) -> None:
    """Prints what a run trains, its memory and its devices.

    Args:
      out: where to print.
      job: the job.
      plan: the plan of its step.
      numbers: from `counts`.
      steps: a description of the number of steps.
    """
    facts = [("trained", trained_text(numbers)), ("memory", memory_text(plan.parts))]
    facts += [("remat", plan.remat)] if plan.remat else []
    facts += [("steps", steps), ("device", f"{device()}; {job.devices.describe()}")]
    out.heading("Plan")
    out.facts(facts)


def summarise(
    job: Job,
    folder: RunFolder,
    state: TrainState,
    *,
    best: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    baseline: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    **numbers: Any,
) -> dict[str, Any]:
    """Returns the JSON values of summary.json.

    Args:
      job: the job.
      folder: the run folder, with its adapter.
      state: the state after the last step.
      best: the line of the best validation.
      test: the adapter's metrics on the test split, if there is one.
      baseline: the frozen base's line, if it was measured.
      seconds: seconds spent on each phase.
      **numbers: ``parameters``, ``memory_bytes``, and a ``warning`` or None.
    """
    aside = ("step", "split", "seconds")
    curves = folder / CURVES
    home = folder / (ADAPTERS if job.adapters else ADAPTER)
    tensors = home.glob(f"{'*/' if job.adapters else ''}{TENSORS}")
    return {
        "run": str(folder.path),
        "metric": job.metric,
        "test": test and {k: test[k] for k in job.metrics},
        "validation": {k: best[k] for k in ("step", *job.metrics)},
        "baseline": baseline and {k: v for k, v in baseline.items() if k not in aside},
        "examples": {k: len(v.examples) for k, v in job.splits.items()},
        "steps": int(state.step),
        "skipped": int(state.skipped),
        **numbers,
        "adapter_bytes": sum(file.stat().st_size for file in tensors),
        "model_bytes": model_bytes(job.loaded.path),
        "seed": job.settings.train.seed,
        "device": device(),
        "mesh": job.devices.sizes,
        "processes": jax.process_count(),
        "versions": versions(),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "files": {
            "adapter": str(home),
            "curves": str(curves) if curves.exists() else None,
        },
    }


def model_bytes(folder: Path) -> int:
    """Returns the size of the weights in a model folder."""
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def device() -> str:
    """Describes the devices."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        own = getattr(os, "sched_getaffinity", None)  # not on macOS
        return f"CPU, {len(own(0)) if own else os.cpu_count()} cores"
    return f"{jax.device_count()} x {first.device_kind}"


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that a result depends on."""
    names = ("lora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        # A checkout on the path is not installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def title(settings: RunSettings, numbers: Mapping[str, Any]) -> str:
    """Returns a title for the curves."""
    data = Path(settings.data.train).name
    return (
        f"LoRA rank {settings.lora.rank} on {data}: {numbers['trainable']:,} trained "
        f"parameters ({numbers['share']:.2%})"
    )


def layer_count(targets: Sequence[Target]) -> int:
    """Counts adapted layers, including each layer of stacked (scanned) blocks."""
    return sum(len(_slices(target)) for target in targets)


def _slices(target: Target) -> list[LayerSlice]:
    return list(layer_slices({target.path: target.kernel_shape}).values())


def target_rows(targets: Sequence[Target]) -> list[tuple[Any, ...]]:
    """Returns a table of targets; layers that differ only in their number share a row.

    The columns are path, number of layers, kind, shape, rank, alpha and parameters.
    """
    groups: dict[tuple[Any, ...], list[Target]] = {}
    is_long = len(targets) > LONG
    for target in targets:
        name = re.sub(r"\d+", "#", target.path) if is_long else target.path
        key = (name, target.kind, target.kernel_shape, target.rank, target.alpha)
        groups.setdefault(key, []).append(target)
    rows = []
    for (name, kind, _, rank, alpha), members in groups.items():
        slices = [part for member in members for part in _slices(member)]
        shape, numbers = slices[0].shape, [re.findall(r"\d+", m.path) for m in members]
        if "#" in name and len(members) > 1 and all(len(n) == 1 for n in numbers):
            ints = [int(n[0]) for n in numbers]
            name = name.replace("#", "{" + _ranges(ints) + "}")
        elif len(members) == 1:
            name = members[0].path
        shown = " x ".join(map(str, shape))
        total = sum(member.trainable for member in members)
        rows.append((name, len(slices), kind, shown, rank, f"{alpha:g}", total))
    return rows


def token_table(tokens: Sequence[TokenRows]) -> list[tuple[Any, ...]]:
    """Returns a row like those of `target_rows` for each layer with trained rows."""
    return [
        (
            each.path,
            1,
            f"rows of {len(each.tokens)} tokens",
            " x ".join(map(str, each.kernel_shape)),
            "-",
            "-",
            math.prod(each.shape),
        )
        for each in tokens
    ]


def counts(job: Job) -> dict[str, Any]:
    """Counts parameters: adapters, head, base, and the share that is trained."""
    each = max(1, len(job.adapters))
    lora = each * count(job.variables[LORA])
    params = each * count(job.variables.get(PARAMS, {}))
    frozen = count(job.variables[FROZEN])
    head = each * count(job.variables.get(PARAMS, {}).get(CLASSIFIER, {}))
    encoder = frozen + params - head
    return {
        "adapter": lora,
        "full": params,
        "frozen": frozen,
        "trainable": lora + params,
        "encoder": encoder,
        "share": (lora + params) / (frozen + lora + params),
        "encoder_share": (lora + params - head) / encoder,
    }


def memory_text(parts: dict[str, int]) -> str:
    """Formats `StepPlan.parts` as one line."""
    return (
        f"base {size(parts['base'])} + trained {size(parts['trained'])} + optimizer "
        f"{size(parts['optimizer'])} + batch and padding {size(parts['other'])} + "
        f"activations and temporaries {size(parts['temporaries'])} = "
        f"{size(parts['total'])}"
    )


def trained_text(numbers: dict[str, Any]) -> str:
    """Formats `counts` as one line."""
    return (
        f"{numbers['trainable']:,} of {numbers['frozen'] + numbers['trainable']:,} "
        f"parameters ({numbers['share']:.2%}): adapters {numbers['adapter']:,}, "
        f"trained in full {numbers['full']:,}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if sorted(numbers) == list(range(low, high + 1)):
        return f"{low}..{high}"
    return ",".join(map(str, sorted(numbers)))
