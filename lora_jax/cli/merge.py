"""`lora-jax merge`: an adapter folded into its base, as a plain Hugging Face folder."""

import argparse
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.cli.jsonl import check_new_folder
from lora_jax.cli.pretrained import load
from lora_jax.finetune.formatting import size
from lora_jax.finetune.report import model_bytes
from lora_jax.models.save import save_model


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Merges.

    Args:
      args: ``model``, ``adapter``, ``out``.
      out: where to print.

    Returns:
      Where it lies, and the largest merge error of a layer.
    """
    target = Path(args.out)
    check_new_folder(target)
    model = load(args.model, args.adapter)
    merged = model.loaded.module.merge(model.variables)
    errors = model.loaded.module.merge_errors(model.variables)
    pooling = getattr(model.loaded.module.model, "pooling", None)
    save_model(target, merged, model.loaded.path, pooling=pooling)
    worst = max(errors, key=lambda error: error.relative)
    facts = [
        ("base", str(model.loaded.path)),
        ("adapter", f"{args.adapter}, {len(errors)} layers"),
        (
            "merge error",
            f"{worst.relative:.1e} of the update's norm at most ({worst.path}), "
            f"{max(error.largest for error in errors):.1e} in an element",
        ),
        ("folder", f"{target} ({size(model_bytes(target))} of weights)"),
    ]
    if model.has_head:
        kept = f"classifier.weight, classifier.bias, on {pooling} pooling"
        facts.append(("head", f"{kept} (config.json says so)"))
    out.heading("Merged")
    out.facts(facts)
    return {
        "out": str(target),
        "layers": len(errors),
        "merge_error": worst.relative,
        "merge_error_layer": worst.path,
        "largest_error": max(error.largest for error in errors),
        "has_head": model.has_head,
        "model_bytes": model_bytes(target),
    }
