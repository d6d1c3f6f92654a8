"""`lora-jax export`: an adapter as a folder that PEFT, vLLM or mlx-lm loads."""

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import Any

from lora_jax.array_types import PyTree
from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_folder
from lora_jax.config import LoRAConfig
from lora_jax.files import atomic
from lora_jax.files.adapter import CONFIG, load_adapter
from lora_jax.files.json_file import read_json
from lora_jax.finetune.formatting import size
from lora_jax.finetune.report import model_bytes
from lora_jax.interop.adapter_folder import RUN_ADAPTERS, adapter_folders, find_adapter
from lora_jax.interop.export import export_adapter
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.identity import base_name
from lora_jax.interop.portable import rewrite_peft
from lora_jax.interop.pretrained import (
    find_base,
    load_model,
    read_external,
)
from lora_jax.models.added_tokens import ADDED
from lora_jax.models.load import LoadedModel
from lora_jax.names import EMBED, HEAD

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Exports an adapter, or each of a run with several, to a folder of its name.

    Args:
      args: ``adapter``, ``model``, ``format``, ``portable``, ``skip_head``, ``out``.
      out: where to print.

    Returns:
      The folder, format and size; of a run with several also their ``adapters``.
    """
    target = new_folder(args.out)
    names = adapter_folders(Path(args.adapter) / RUN_ADAPTERS)
    if names:
        with atomic.new_folder(target) as home:
            bases = [
                _export(args, Path(args.adapter) / RUN_ADAPTERS / name, home / name)
                for name in names
            ]
    else:
        bases = [_export(args, args.adapter, target)]
    folders = [target / name for name in names] or [target]
    total = sum(model_bytes(folder) for folder in folders)
    files = sorted({f.name for each in folders for f in each.glob("*.safetensors")})
    shown = args.format + (", portable" if args.portable else "")
    each = f"{len(names)} folders, each " if names else ""
    out.heading("Exported")
    out.facts(
        [
            ("adapters" if names else "adapter", str(args.adapter)),
            ("format", shown),
            ("folder", f"{target} ({each}{', '.join(files)}, {size(total)})"),
        ]
    )
    if args.portable:
        more = "" if names else " (repeat NAME=DIR for more adapters of this base)"
        out.say(f"To serve {'them' if names else 'it'}{more}:")
        out.say(vllm_command(*folders, base=bases[0]))
    elif args.format == "peft":
        out.say("For vLLM, export with --portable, which prints how to serve it.")
    return {
        "out": str(target),
        "format": args.format,
        "portable": args.portable,
        "adapter_bytes": total,
        **({"adapters": names} if names else {}),
    }


def _export(args: argparse.Namespace, adapter: str | Path, target: Path) -> str | None:
    """Exports one adapter to a folder; returns where its base is, if that is known."""
    folder = find_adapter(adapter)
    external = read_external(folder)
    model = args.model
    if external is not None and model is None:
        with contextlib.suppress(ValueError):
            model = find_base(external)
    if (
        external is not None
        and args.format == "peft"
        and (model is None or (_adds_to_base(external) and not args.portable))
    ):
        if model is not None:
            load_model(model, folder)  # an adapter that doesn't fit it is an error
        rewrite_peft(target, external, portable=args.portable, base_model=args.model)
        return model
    base = model or find_base(folder if external is None else external)
    variables, config, source, extra = _read(folder, base, external)
    export_adapter(
        target,
        variables,
        config,
        source,
        format=args.format,
        portable=args.portable,
        pooling=extra.get("pooling"),
        skip_head=args.skip_head,
        base_model=base_name(args.model, extra.get("model")),
    )
    return base


def vllm_command(*folders: Path, base: str | None = None) -> str:
    """Returns the command with which vLLM serves portable adapters on their base.

    Args:
      *folders: the adapters.
      base: where their base is, if known: a folder is served from there, unless the
        adapters have its hub id.
    """
    configs = [read_json(folder / CONFIG) for folder in folders]
    named, rank = configs[0]["base_model_name_or_path"], max(c["r"] for c in configs)
    is_local = "/" not in (named or "") and base is not None and Path(base).is_dir()
    base = base if is_local else named
    largest = next((r for r in VLLM_RANKS if r >= rank), rank)
    options = ["--enable-lora", "--max-lora-rank", str(largest), "--lora-modules"]
    names = [f"{folder.name}={folder}" for folder in folders]
    return shlex.join(["vllm", "serve", base or "BASE", *options, *names])


def _adds_to_base(adapter: ExternalAdapter) -> bool:
    """Returns whether the adapter also changes rows or biases of the base."""
    biases = (factors.bias is not None for factors in adapter.modules.values())
    return bool(adapter.tokens) or any(biases)


def _read(
    folder: Path, base: str, external: ExternalAdapter | None
) -> tuple[dict[str, PyTree], LoRAConfig, LoadedModel | str, dict[str, Any]]:
    """Reads an adapter, and the model where its names or its head must be known."""
    if external is None:
        found = load_adapter(folder)
        changed = {path for tree in found.variables.values() for path in tree}
        if (EMBED not in changed or HEAD in changed) and not found.extra.get(ADDED):
            return found.variables, found.config, base, found.extra
        # Its head may be the embedding or not, and it may have new tokens.
        loaded = load_model(base, folder)
        return loaded.variables, found.config, loaded, found.extra
    loaded = load_model(base, folder)
    named = external.config.get("base_model_name_or_path")
    return loaded.variables, loaded.module.config, loaded, {"model": named}
