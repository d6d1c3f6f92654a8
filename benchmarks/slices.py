"""The smallest TPU slices for large decoders, planned without a TPU.

libtpu compiles each model's LoRA step (rank 16 on all linears, bfloat16, blocks
rematerialised) for slices of each chip, smallest first, until it fits: one row of 4,096
tokens per chip, weights and rows sharded over the whole slice (fsdp). It uses shapes
only, from each model's public ``config.json`` in ``benchmarks/models/``. A slice too
small for the weights alone is not compiled.

A compilation takes minutes, so each result is appended to ``results/slices.jsonl``, and
a second run continues from there; delete the file to start over.
"""

import importlib.metadata
import json
import os
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, commit

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
MODELS = {  # name: source of its config.json
    "llama-3.1-8b": "huggingface.co/meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "huggingface.co/meta-llama/Llama-3.1-70B",
    "qwen3-32b": "huggingface.co/Qwen/Qwen3-32B",
    "gemma-3-27b": "huggingface.co/google/gemma-3-27b-pt, its text_config",
    "qwen3-30b-a3b": "huggingface.co/Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "huggingface.co/openai/gpt-oss-20b, in bfloat16",
    "qwen3.6-35b-a3b": "huggingface.co/Qwen/Qwen3.6-35B-A3B, its text_config",
}
FOLDER = Path(__file__).parent / "models"
DONE = RESULTS / "slices.jsonl"
RANK, ALPHA, TOKENS, REMAT = 16, 32, 4096, "block"
NAMED = ("llama-3.1-8b", "v5e:4x4")  # always compiled
GIB = 2**30


def main(quick: bool, targets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Plans all models on all chips.

    Args:
      quick: only the smallest model on the slice of `NAMED`.
      targets: plan only these slices, of every model that has no smaller one.

    Returns:
      One row per slice tried, in previous runs too.
    """
    from lora_jax.plan.fit import first_fitting
    from lora_jax.plan.slices import CHIPS

    rows = [price(*NAMED)]
    if quick:
        return rows
    if targets:
        for model in MODELS:
            for name in targets:
                kind = name.partition(":")[0]
                tried = [row for row in _done() if row["model"] == model]
                if not any(r["fits"] and r["topology"].startswith(kind) for r in tried):
                    price(model, name)
        order = list(MODELS)
        found = sorted(_done(), key=lambda row: order.index(row["model"]))
        return rows + [row for row in found if row not in rows]
    for model in MODELS:
        for kind, chip in CHIPS.items():
            _, tried = first_fitting(
                lambda name, model=model: _Priced(**price(model, name)),
                [f"{kind}:{shape}" for shape in chip.slices],
            )
            found = [vars(plan) for plan in tried.values()]
            rows += [row for row in found if row not in rows]
    return rows


class _Priced(types.SimpleNamespace):
    """A row with the attributes of a plan, for `first_fitting`."""


def price(model: str, topology: str) -> dict[str, Any]:
    """Plans one model on one slice, or reads the result of a previous run.

    Args:
      model: a key of `MODELS`.
      topology: the slice.

    Returns:
      The row, as in `DONE`.
    """
    asked = {"model": model, "topology": topology, "versions": _versions()}
    for row in _done():
        if asked.items() <= row.items():
            return row
    row = {**asked, **_plan(model, topology)}
    DONE.parent.mkdir(exist_ok=True)
    with DONE.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(_line(row), flush=True)
    return row


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def _done() -> list[dict[str, Any]]:
    """Returns the results of previous runs with these versions."""
    lines = DONE.read_text().splitlines() if DONE.exists() else ()
    rows = map(json.loads, lines)
    return [row for row in rows if row["versions"] == _versions()]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| model | slice | rows | weights, adapters, optimizer | activations and "
        "temporaries | total per chip | fits | compiled in (CPU time) |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    from lora_jax.plan.slices import CHIPS

    smallest: dict[str, list[str]] = {}
    for row in rows:
        if row["fits"] and (row["model"], row["topology"]) != NAMED:
            smallest.setdefault(row["model"], []).append(row["topology"])
    tried = {(row["model"], row["topology"]) for row in rows}
    if smallest:
        lines += ["", "Smallest slices that fit:", ""]
        lines += ["| model | v5e | v5p | v6e |", "|---|---|---|---|"]
        for model, fitting in smallest.items():
            by_kind = {name.partition(":")[0]: name for name in fitting}
            largest = {kind: f"{kind}:{c.slices[-1]}" for kind, c in CHIPS.items()}
            found = (
                by_kind.get(kind, "none" if (model, last) in tried else "not found yet")
                for kind, last in largest.items()
            )
            lines.append(f"| {model} | {' | '.join(found)} |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    state = (row["base"] + row["trained"] + row["optimizer"] + row["other"]) / GIB
    spent = f"{row['seconds']:.0f} s ({row['cpu_seconds']:.0f} s)"
    temporaries = "not compiled"
    if row["temporaries"] is not None:
        temporaries = f"{row['temporaries'] / GIB:.2f} GiB"
    return (
        f"| {row['model']} | {row['topology']} | {row['batch']} | {state:.2f} GiB | "
        f"{temporaries} | {row['total'] / GIB:.2f} of {row['limit'] / GIB:.0f} GiB | "
        f"{'yes' if row['fits'] else 'no'} | "
        f"{spent if row['temporaries'] is not None else '–'} |"
    )


def _plan(model: str, topology: str) -> dict[str, Any]:
    import jax.numpy as jnp

    from lora_jax import LoRAConfig, make_mesh, make_sharding
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.families import FAMILIES
    from lora_jax.plan.slices import check_topology, chips_of, open_slice
    from lora_jax.plan.topology import DecoderSteps

    settings = json.loads((FOLDER / model / "config.json").read_text())
    config = FAMILIES[settings["model_type"]].read_config(settings)
    mesh = make_mesh(data=1, fsdp=-1, devices=open_slice(topology))
    can_scan = config.scan_period is not None
    steps = DecoderSteps(
        Decoder(config, dtype=jnp.bfloat16, scan_layers=can_scan, remat=REMAT),
        LoRAConfig(rank=RANK, alpha=ALPHA),
        TOKENS,
        make_sharding(mesh),
        check_topology(topology).memory,
        param_dtype=jnp.bfloat16,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    plan = steps.price(chips_of(topology))
    flops = steps.flops(plan)
    return {
        **plan._asdict(),
        "total": plan.total,
        "flops": flops.lora,
        "saved": round(flops.saved, 4),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "commit": commit(),
    }
