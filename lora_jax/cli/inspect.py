"""`lora-jax inspect`: the contents of an adapter, run or model folder."""

import argparse
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune.formatting import size
from lora_jax.finetune.inspection import inspect
from lora_jax.finetune.report import model_bytes


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Inspects a folder or a GGUF file; returns the result of `inspect`."""
    found = inspect(args.dir)
    if out.as_json:
        return found
    stored = size(model_bytes(Path(found["path"])))
    damage = ", ".join(f"{n}: {k} values" for n, k in found["not_finite"].items())
    broken = ("not finite", damage or "none")
    if found["kind"] == "model":
        out.heading(f"Model {found['path']}")
        tensors, total = found["tensors"], found["parameters"]
        numbers = f"{len(tensors)}, {total:,} numbers, {stored}"
        out.facts([("tensors", numbers), broken])
        rows = [
            (t["name"], " x ".join(map(str, t["shape"])), t["dtype"], _norm(t["norm"]))
            for t in tensors
        ]
        out.table(("tensor", "shape", "dtype", "norm"), rows)
        return found
    full = ", ".join(f"{n} {s}" for n, s in found["full"].items())
    numbers = ("numbers", f"{found['trainable']:,} in {stored}")
    in_full = ("in full", full or "nothing")
    if "tool" in found:
        config = found["config"]
        named = config.get("base_model_name_or_path", config.get("model"))
        out.heading(f"Adapter {found['path']}, written by {found['tool']}")
        facts = [
            ("trained on", str(named or "unknown")),
            ("variant", ", ".join(found["variant"]) or "plain LoRA"),
            numbers,
            in_full,
            ("unknown keys", ", ".join(found["unknown"]) or "none"),
        ]
    else:
        out.heading(f"Adapter {found['path']}")
        facts = [
            ("trained on", str(found["extra"].get("model", "unknown"))),
            ("base", f"fingerprint {found['base']}"),
            ("targets", str(found["lora"]["targets"])),
            numbers,
            in_full,
            broken,
        ]
    out.facts(facts)
    columns = ("layer", "rank", "alpha", "norm of update", "largest singular value")
    rows = [
        (r["path"], r["rank"], f"{r['alpha']:g}", _norm(r["norm"]), _norm(r["top"]))
        for r in found["layers"]
    ]
    out.table(columns, rows)
    return found


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
