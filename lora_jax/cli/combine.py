"""`lora-jax combine`: adds up adapters of one base, or changes an adapter's rank."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_folder
from lora_jax.cli.pretrained import load
from lora_jax.files.adapter import save_adapter
from lora_jax.finetune.errors import UserError
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import FROZEN, LORA, PARAMS
from lora_jax.tree.combine import Combined, combine_adapters
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import flatten
from lora_jax.tree.token_rows import token_rows_of


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Combines.

    Args:
      args: ``adapters``, ``weights``, ``method``, ``rank``, ``density``, ``seed``,
        ``model``, ``out``.
      out: where to print.

    Returns:
      See `save`.
    """
    target = new_folder(args.out)
    weights = args.weights or [1.0] * len(args.adapters)
    loaded = [load(args.model, adapter) for adapter in args.adapters]
    modules: list[Any] = [one.module for one in loaded]
    trained = [sorted(flatten(one.variables.get(PARAMS, {}))) for one in loaded]
    if len(loaded) > 1 and any(trained):
        pairs = zip(args.adapters, trained, strict=True)
        shown = [f"{adapter}: {', '.join(paths)}" for adapter, paths in pairs if paths]
        raise UserError(
            "only A and B can be added up, but some adapters also train weights in "
            f"full ({'; '.join(shown)})."
        )
    combined = combine_adapters(
        [
            (one.variables[LORA], module.targets(one.params))
            for one, module in zip(loaded, modules, strict=True)
        ],
        weights,
        method=args.method,
        rank=args.rank,
        density=args.density,
        seed=args.seed,
        params=loaded[0].params,
    )
    if len(loaded) == 1:  # what it trains in full stays
        own = modules[0].config
        kept = {"train": own.train, "bias": own.bias, "tokens": own.tokens}
        config = dataclasses.replace(combined.config, **kept)
        combined = combined._replace(config=config)
    extra = dict(loaded[0].extra or {})
    base = args.model or extra.get("model", str(loaded[0].path))
    named = dict(zip(map(str, args.adapters), weights, strict=True))
    extra |= {"model": base, "combined": named}
    source = ", ".join(f"{weight:g} x {name}" for name, weight in named.items())
    out.heading("Combined")
    out.facts([("adapters", source), ("method", args.method)])
    return save(target, loaded[0], combined, extra, out)


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
      The folder, the ranks, and what the rank cuts off the layers' updates.
    """
    config, errors = combined.config, combined.errors
    rows = token_rows_of(base.variables) if config.tokens else {}
    variables = partition(join(base.params, combined.lora, rows), config)
    mark = fingerprint(variables.pop(FROZEN))
    written = save_adapter(folder, variables, config, mark, extra=extra)
    worst = max(errors, key=lambda path: errors[path])
    mean = sum(errors.values()) / len(errors)
    ranks = sorted({config.rank_for(path) for path in errors})
    cut = f"{mean:.2%} of a layer's update on average, {errors[worst]:.2%} at most"
    out.facts(
        [
            ("layers", str(len(errors))),
            ("rank", ", ".join(map(str, ranks))),
            ("cut off", f"{cut} ({worst})" if errors[worst] > 0 else "nothing"),
            ("folder", f"{folder} ({written:,} bytes)"),
        ]
    )
    return {
        "out": str(folder),
        "layers": len(errors),
        "ranks": ranks,
        "mean_error": mean,
        "largest_error": errors[worst],
        "largest_error_layer": worst,
    }
