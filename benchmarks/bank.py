"""Three ways to give every row its own adapter, by tokens a row and size of the bank.

One dense layer of ``d x d``: the update of a batch's rows, each with a random adapter
of the bank, as `lora_jax.ops.banked` computes it. Beside it the layer's own product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import alternate, is_on_cpu, measured
from lora_jax.ops.banked import WAYS, banked_update

BASE = "x W0"
ROWS, RANK = 8, 8
CPU_WIDTH, WIDTH = 768, 4096
TOKENS, ADAPTERS = (1, 16, 128), (2, 8, 32, 128)


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all shapes.

    Args:
      quick: fewer samples, tokens and adapters.

    Returns:
      One row for each number of tokens and adapters.
    """
    width = CPU_WIDTH if is_on_cpu() else WIDTH
    tokens, adapters = (TOKENS, ADAPTERS) if not quick else (TOKENS[:2], ADAPTERS[:2])
    return [_timed(width, t, m, 3 if quick else 15) for t in tokens for m in adapters]


def _timed(d: int, t: int, m: int, rounds: int) -> dict[str, Any]:
    dtype = jnp.float32 if is_on_cpu() else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((ROWS, t, d), (m + 1, d, RANK), (m + 1, RANK, d), (d, d))
    x, a, b, w = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=False)
    )
    ids = jax.random.randint(keys[4], (ROWS,), 1, m + 1)
    base = jax.jit(jnp.matmul)
    contenders = {BASE: measured(base.lower(x, w), functools.partial(base, x, w))}
    for way in WAYS:
        call = jax.jit(functools.partial(banked_update, way=way))
        run = functools.partial(call, x, a, b, ids)
        contenders[way] = measured(call.lower(x, a, b, ids), run)
    calls = max(1, 64 // t)  # of a few microseconds each
    facts = {"d": d, "rows": ROWS, "tokens": t, "adapters": m, "rank": RANK}
    return {**facts, **alternate(contenders, rounds, calls)}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, the fastest way in bold."""
    lines = [
        f"| d | rows x tokens | adapters | ms {BASE} | "
        f"{' | '.join(f'ms {way}' for way in WAYS)} |",
        "|---" * (4 + len(WAYS)) + "|",
    ]
    for row in rows:
        best = min(WAYS, key=lambda way: row[way]["median_ms"])
        shown = [f"{row[way]['median_ms']:.3g}" for way in WAYS]
        shown = [
            f"**{x}**" if way == best else x for way, x in zip(WAYS, shown, strict=True)
        ]
        columns = (
            *(row["d"], f"{row['rows']} x {row['tokens']}", row["adapters"]),
            *(f"{row[BASE]['median_ms']:.3g}", *shown),
        )
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)
