"""Inference cost of unmerged adapters by rank, and merged ones, against the base.

A merged model has the same cost as the base. Unmerged, each adapted layer also
multiplies by A and B, which adds ``r (in + out) / (in out)`` of its FLOPs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders
from benchmarks.harness import alternate, is_on_cpu, measured
from lora_jax import LoRAConfig, adapt
from lora_jax.models.decoder import Decoder

RANKS, TOKENS = (4, 16, 64, 256), 512


def main(quick: bool) -> list[dict[str, Any]]:
    """Times one forward pass to the hidden states (1 x 512 tokens on a CPU).

    Args:
      quick: fewer samples and ranks.

    Returns:
      One row: base, merged and each rank.
    """
    spec = contenders.decoder_specs()[0]
    shape = (1, TOKENS) if is_on_cpu() else (spec.batch, spec.length)
    ids = np.random.default_rng(0).integers(0, spec.config.vocab_size, shape)
    ids = jnp.asarray(ids, jnp.int32)
    model = Decoder(spec.config, dtype=contenders.dtype(), scan_layers=True)
    params = contenders.init(model, ids)

    def contender(module, variables, **facts):
        run = jax.jit(lambda variables: module.apply(variables, ids, method="hidden"))
        return measured(run.lower(variables), lambda: run(variables), **facts)

    timed = {"base": contender(model, {"params": params}, formula=0.0)}
    for rank in RANKS[1:3] if quick else RANKS:
        adapted = adapt(model, LoRAConfig(rank=rank, alpha=2 * rank), ids)
        variables = adapted.attach(params, jax.random.key(1))
        targets = adapted.targets(params)
        kernels = sum(math.prod(target.kernel_shape) for target in targets)
        formula = sum(target.trainable for target in targets) / kernels
        if "merged" not in timed:
            merged = {"params": adapted.merge(variables)}
            timed["merged"] = contender(model, merged, formula=0.0)
        timed[f"rank {rank}"] = contender(adapted, variables, formula=formula)
    timed = alternate(timed, 7 if quick else 25)
    return [{"model": spec.name, "tokens": ids.size, **timed}]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        f"{rows[0]['model']}, {rows[0]['tokens']:,} tokens:\n",
        "| | ms (quartiles) | time over the base | FLOPs over the base | formula |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        base = row["base"]
        digits = 0 if base["median_ms"] >= 100 else 2
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            slower = found["median_ms"] / base["median_ms"] - 1
            more = "–"
            if base["flops"]:
                more = f"{found['flops'] / base['flops'] - 1:+.1%}"
            lines.append(
                f"| {name} | {found['median_ms']:.{digits}f} "
                f"({low:.{digits}f}–{high:.{digits}f}) | {slower:+.1%} | "
                f"{more} | {found['formula']:+.1%} |"
            )
    return "\n".join(lines)
