"""`lora-jax merge`: merges an adapter into its base, as a plain Hugging Face folder."""

import argparse
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_folder
from lora_jax.cli.pretrained import load
from lora_jax.finetune.formatting import size
from lora_jax.finetune.report import layer_count, model_bytes
from lora_jax.interop.adapter_folder import find_adapter
from lora_jax.interop.identity import base_name, describe_adapter
from lora_jax.models.load import as_stored
from lora_jax.models.save import save_model
from lora_jax.names import CLASSIFIER, FROZEN
from lora_jax.tree.fingerprint import fingerprint


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Merges an adapter; returns the folder and the largest merge error."""
    target = new_folder(args.out)
    found = load(args.model, args.adapter)
    folder = find_adapter(args.adapter)
    base = base_name(args.model, (found.extra or {}).get("model"), found.path)
    mark = fingerprint(found.variables[FROZEN])
    loaded = as_stored(found)
    adapted: Any = loaded.module
    merged = adapted.merge(loaded.variables)
    errors = adapted.merge_errors(loaded.variables)
    pooling = getattr(adapted.model, "pooling", None)
    record = describe_adapter(folder, base, mark)
    save_model(
        target,
        merged,
        loaded.path,
        pooling=pooling,
        merged=record,
        add_tokens=loaded.added,
    )
    has_head = CLASSIFIER in loaded.params
    layers = layer_count(adapted.targets(loaded.params))
    worst = max(errors, key=lambda error: error.relative)
    facts = [
        ("base", str(loaded.path)),
        ("adapter", f"{args.adapter}, {layers} layers"),
        (
            "merge error",
            f"{worst.relative:.1e} of the update's norm at most ({worst.path}), "
            f"{max(error.largest for error in errors):.1e} in an element",
        ),
        ("folder", f"{target} ({size(model_bytes(target))} of weights)"),
    ]
    if has_head:
        kept = f"classifier.weight, classifier.bias, on {pooling} pooling"
        facts.append(("head", f"{kept} (recorded in config.json)"))
    out.heading("Merged")
    out.facts(facts)
    return {
        "out": str(target),
        "layers": layers,
        "merge_error": worst.relative,
        "merge_error_layer": worst.path,
        "largest_error": max(error.largest for error in errors),
        "has_head": has_head,
        "model_bytes": model_bytes(target),
    }
