"""`lora-jax combine`: adds up adapters of one base, or changes an adapter's rank."""

import argparse
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_folder
from lora_jax.cli.pretrained import load
from lora_jax.files.adapter import save_adapter
from lora_jax.finetune.errors import UserError
from lora_jax.interop.common_base import common_base
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import FROZEN, LAYERS, LORA, LORA_B, PARAMS
from lora_jax.tree.combine import Combined, combine_adapters
from lora_jax.tree.combine_trained import combine_trained
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import child
from lora_jax.tree.token_rows import token_rows_of


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Combines.

    Args:
      args: ``adapters``, ``weights``, ``method``, ``rank``, ``density``, ``seed``,
        ``head``, ``model``, ``out``.
      out: where to print.

    Returns:
      See `save`.
    """
    target = new_folder(args.out)
    weights = args.weights or [1.0] * len(args.adapters)
    if args.head is not None and args.head not in args.adapters:
        raise UserError(
            f"--head must be one of the adapters, {', '.join(args.adapters)}; got "
            f"{args.head}."
        )
    method = args.method or ("cat" if args.rank is None else "svd")
    unused = {
        "--density": args.density is not None and method in ("cat", "svd"),
        "--seed": args.seed is not None and not method.startswith("dare"),
    }
    if any(unused.values()):
        shown = " and ".join(name for name, is_unused in unused.items() if is_unused)
        raise UserError(
            f"--method {method} has no {shown}: --density is of ties, dare and "
            "dare_ties, --seed of dare and dare_ties."
        )
    loaded = [load(args.model, adapter) for adapter in args.adapters]
    if len({LAYERS in one.params for one in loaded}) > 1:  # some are scanned
        loaded = [load(args.model, each, scan_layers=False) for each in args.adapters]
    head = args.adapters[0] if len(loaded) == 1 and weights == [1.0] else args.head
    named = dict(zip(args.adapters, loaded, strict=True))
    base = common_base(named, args.model, head=head)
    modules: list[Any] = [one.module for one in loaded]
    combined = combine_adapters(
        [
            (one.variables[LORA], module.targets(one.params))
            for one, module in zip(loaded, modules, strict=True)
        ],
        weights,
        method=method,
        rank=args.rank,
        density=0.5 if args.density is None else args.density,
        seed=args.seed or 0,
        params=base.params,
    )
    if head is not None:  # what it trains in full stays
        lead, extra = named[head], named[head].extra
        module: Any = lead.module
        own = module.config
        kept = {"train": own.train, "bias": own.bias, "tokens": own.tokens}
    else:
        lead, extra, kept = _with_trained(named, loaded, weights, base)
    config = dataclasses.replace(combined.config, **kept)
    combined = combined._replace(config=config)
    extra = dict(extra or {})
    path = args.model or extra.get("model", str(loaded[0].path))
    # Pairs: an adapter may be there twice.
    added = [[str(name), w] for name, w in zip(args.adapters, weights, strict=True)]
    extra |= {"model": path, "combined": added}
    source = ", ".join(f"{weight:g} x {name}" for name, weight in added)
    out.heading("Combined")
    out.facts([("adapters", source), ("method", method)])
    return save(target, lead, combined, extra, out)


def _with_trained(
    named: Mapping[str, LoadedModel],
    loaded: Sequence[LoadedModel],
    weights: Sequence[float],
    base: LoadedModel,
) -> tuple[LoadedModel, Mapping[str, Any] | None, dict[str, Any]]:
    """Combines what adapters train in full.

    Returns:
      The base with these weights, what was kept beside the adapter with the head, and
      the fields of a config that trains them.
    """
    modules: dict[str, Any] = {name: one.module for name, one in named.items()}
    configs = [module.config for module in modules.values()]
    if rows := [name for name, module in modules.items() if module.config.tokens]:
        raise UserError(
            f"rows of tokens can't be added up; {', '.join(rows)} trains some. Take "
            "those of one adapter: --head DIR."
        )
    trained = [one.variables.get(PARAMS, {}) for one in loaded]
    found = combine_trained(trained, weights, base.params, absent=base.new)
    owners = [name for name, one in named.items() if _has(one, base.new)] or [*named]
    labels = {
        json.dumps((named[name].extra or {}).get("labels")): name for name in owners
    }
    if base.new and len(labels) > 1:
        each = "; ".join(f"{text} of {name}" for text, name in labels.items())
        raise UserError(
            f"heads of different classes can't be averaged: {each}. Take that of one "
            "adapter: --head DIR."
        )
    params = {**flatten(base.params), **flatten(found)}
    biases = ("none", "lora_only", "all")
    kept = {
        "train": tuple(dict.fromkeys(each for own in configs for each in own.train)),
        "bias": max((own.bias for own in configs), key=biases.index),
    }
    whole = base._replace(variables={PARAMS: unflatten(params)})
    return whole, named[owners[0]].extra, kept


def _has(loaded: LoadedModel, paths: Collection[str]) -> bool:
    """Returns whether an adapter trains some weights."""
    return bool({*paths} & flatten(loaded.variables.get(PARAMS, {})).keys())


def save(
    folder: Path,
    base: LoadedModel,
    combined: Combined,
    extra: Mapping[str, Any],
    out: Console,
) -> dict[str, Any]:
    """Saves a computed adapter, and prints what it is.

    Args:
      folder: to write.
      base: the model that it belongs to.
      combined: what was computed.
      extra: kept beside it.
      out: where to print.

    Returns:
      The folder, the ranks, and what the rank cuts off the layers' updates: the norm
      of the rest over the update's, and the energy kept, 1 minus its square.
    """
    config, leaves = combined.config, flatten(combined.lora)
    # An update of zero is kept whole at any rank, and says nothing about this one.
    changed = {
        p: e for p, e in combined.errors.items() if leaves[child(p, LORA_B)].any()
    }
    errors = changed or combined.errors
    rows = token_rows_of(base.variables) if config.tokens else {}
    variables = partition(join(base.params, combined.lora, rows), config)
    mark = fingerprint(variables.pop(FROZEN))
    written = save_adapter(folder, variables, config, mark, extra=extra)
    worst = max(errors, key=lambda path: errors[path])
    mean = sum(errors.values()) / len(errors)
    energies = [1 - error**2 for error in errors.values()]
    energy, least = sum(energies) / len(energies), min(energies)
    ranks = sorted({config.rank_for(path) for path in combined.errors})
    cut = f"{mean:.2%} of a layer's update on average, {errors[worst]:.2%} at most"
    out.facts(
        [
            ("layers", f"{len(combined.errors)}, {len(changed)} of them changed"),
            ("rank", ", ".join(map(str, ranks))),
            ("cut off", f"{cut} ({worst})" if errors[worst] > 0 else "nothing"),
            ("energy kept", f"{energy:.2%} on average, {least:.2%} at least"),
            ("folder", f"{folder} ({written:,} bytes)"),
        ]
    )
    return {
        "out": str(folder),
        "layers": len(combined.errors),
        "changed": len(changed),
        "ranks": ranks,
        "mean_error": mean,
        "largest_error": errors[worst],
        "largest_error_layer": worst,
        "mean_energy_kept": energy,
        "least_energy_kept": least,
    }
