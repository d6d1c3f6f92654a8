"""`lora-jax extract`: the LoRA adapter closest to a full fine-tuning."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from lora_jax.cli.combine import save
from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_folder
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import listed
from lora_jax.interop.pretrained import load_model
from lora_jax.models.target_names import translate_names
from lora_jax.nn.find_targets import find_targets
from lora_jax.tree.combine import extract_adapter
from lora_jax.tree.paths import flatten

SHOWN = 8


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Extracts.

    Args:
      args: ``model``, ``tuned``, ``rank``, ``targets``, ``out``.
      out: where to print.

    Returns:
      See `lora_jax.cli.combine.save`, and ``left``: changed weights without an adapter.
    """
    target = new_folder(args.out)
    base, tuned = load_model(args.model), load_model(args.tuned)
    if faults := _differences(base.config, tuned.config):
        raise UserError(
            f"{args.tuned} must be a fine-tuned {args.model}; their configs differ: "
            f"{'; '.join(faults)}."
        )
    chosen = args.targets or ALL_LINEAR
    config = LoRAConfig(rank=args.rank, targets=chosen)
    config = translate_names(config, base.family, base.config)
    rows = find_targets(base.module, config, *base.inputs, params=base.params)
    combined = extract_adapter(base.params, tuned.params, rows)
    before, after = flatten(base.params), flatten(tuned.params)
    adapted = {row.weight_path for row in rows}
    left = [
        path
        for path, leaf in before.items()
        if path not in adapted and not np.array_equal(leaf, after[path])
    ]
    out.heading("Extracted")
    out.facts([("base", args.model), ("tuned", args.tuned)])
    result = save(target, base, combined, {"model": args.model}, out)
    if left:
        shown = listed(left, SHOWN)
        out.say(f"Changed, and not in the adapter: {shown}.", style="yellow")
    return {**result, "left": left}


def _differences(base: Any, tuned: Any) -> list[str]:
    """Lists what a model's config says otherwise than its base's."""
    if type(base) is not type(tuned):
        return [f"{type(tuned).__name__}, not {type(base).__name__}"]
    fields = [field.name for field in dataclasses.fields(base)]
    values = [(name, getattr(tuned, name), getattr(base, name)) for name in fields]
    return [f"{name} = {new}, not {old}" for name, new, old in values if new != old]
