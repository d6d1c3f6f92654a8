"""Memory of a step on long rows, on TPU v5p: one chip, or a row split over four.

libtpu compiles Llama-3.1-8B's LoRA step (rank 16 on all linears, bfloat16, blocks
rematerialised) for ``v5p:2x2x1`` from its public ``config.json``, with one row a chip
and the weights split over the four (fsdp), or with one row for all of them (the mesh
axis ``sequence``), whose weights are copied. Nothing is run: memory is XLA's.

A compilation takes minutes, so each result is appended to ``results/long_rows.jsonl``,
and a second run continues from there; delete the file to start over.
"""

import importlib.metadata
import json
import time
from typing import Any

from benchmarks.harness import RESULTS, commit
from benchmarks.slices import ALPHA, FOLDER, RANK, REMAT

DONE = RESULTS / "long_rows.jsonl"
MODEL, TOPOLOGY = "llama-3.1-8b", "v5p:2x2x1"
LENGTHS = (4096, 8192, 32_768, 131_072)
MESHES = {"one row a chip": {"fsdp": 4}, "a row over 4 chips": {"sequence": 4}}
GIB = 2**30


def main(quick: bool) -> list[dict[str, Any]]:
    """Plans all lengths, the longest first.

    Args:
      quick: only what was planned before.

    Returns:
      One row per length and mesh.
    """
    rows = []
    for tokens in LENGTHS[::-1]:
        for name in list(MESHES)[::-1]:
            found = _done(tokens, name)
            if found is None and not quick:
                found = _plan(tokens, name)
                with DONE.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            if found is not None:
                rows.append(found)
    return rows[::-1]


def _asked(tokens: int, mesh: str) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"tokens": tokens, "mesh": mesh, "versions": versions}


def _done(tokens: int, mesh: str) -> dict[str, Any] | None:
    """Returns the result of a previous run with these versions."""
    asked = _asked(tokens, mesh)
    lines = DONE.read_text().splitlines() if DONE.exists() else ()
    return next((r for r in map(json.loads, lines) if asked.items() <= r.items()), None)


def _plan(tokens: int, name: str) -> dict[str, Any]:
    import jax.numpy as jnp

    from lora_jax import LoRAConfig, make_mesh, make_sharding
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.families import FAMILIES
    from lora_jax.plan.slices import check_topology, open_slice
    from lora_jax.plan.topology import DecoderSteps

    settings = json.loads((FOLDER / MODEL / "config.json").read_text())
    config = FAMILIES[settings["model_type"]].read_config(settings)
    mesh = make_mesh(data=1, **MESHES[name], devices=open_slice(TOPOLOGY))
    steps = DecoderSteps(
        Decoder(config, dtype=jnp.bfloat16, scan_layers=True, remat=REMAT),
        LoRAConfig(rank=RANK, alpha=ALPHA),
        tokens,
        make_sharding(mesh),
        check_topology(TOPOLOGY).memory,
        param_dtype=jnp.bfloat16,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    plan = steps.price(steps.rows())
    return {
        **_asked(tokens, name),
        **plan._asdict(),
        "total": plan.total,
        "fits": plan.fits,
        "flops": steps.flops(plan).lora,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "commit": commit(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| tokens a row | mesh | tokens a chip | weights, adapters, optimizer | "
        "activations and temporaries | total per chip | fits 95 GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["tokens"] // (4 if "over" in row["mesh"] else 1)
        state = (row["base"] + row["trained"] + row["optimizer"] + row["other"]) / GIB
        lines.append(
            f"| {row['tokens']:,} | {row['mesh']} | {own:,} | {state:.2f} GiB | "
            f"{row['temporaries'] / GIB:.2f} GiB | {row['total'] / GIB:.2f} GiB | "
            f"{'yes' if row['fits'] else 'no'} |"
        )
    return "\n".join(lines)
