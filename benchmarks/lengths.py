"""Memory and time of a training step by sequence length, against plain autodiff.

One row of tokens through 4 layers of the first decoder of `benchmarks.contenders`.
Plain autodiff is ``x W + s (x A) B`` as written, with `jax.nn.dot_product_attention`
and all logits. Programs that need more memory than the limit in `sizes` are compiled
but not run.
"""

import dataclasses
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import contenders, rivals
from benchmarks.harness import Contender, alternate, is_on_cpu
from lora_jax.models import decoder_block
from lora_jax.models.decoder_config import DecoderConfig

OURS, BLOCK, PLAIN = "lora_jax", "lora_jax, remat block", "plain autodiff"


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all lengths.

    Args:
      quick: only the three shortest, with fewer samples.

    Returns:
      One row per length.
    """
    lengths, limit = sizes()
    lengths = lengths[:3] if quick else lengths
    return [compare(t, limit, 3 if quick or t > 2048 else 5) for t in lengths]


def sizes() -> tuple[tuple[int, ...], int]:
    """Returns the lengths for this device, and the maximum bytes of temporaries."""
    if is_on_cpu():
        return (512, 1024, 2048, 4096, 8192), 8 * 2**30
    memory = jax.devices()[0].memory_stats()["bytes_limit"]
    return (2048, 4096, 8192, 16384, 32768), memory // 2  # the rest is for weights


def compare(t: int, limit: int, rounds: int) -> dict[str, Any]:
    """Compiles the contenders for ``t`` tokens, and times those that fit."""
    config = dataclasses.replace(
        contenders.decoder_specs()[0].config,
        num_layers=4,
        layer_ropes=(0,) * 4,
        layer_windows=(None,) * 4,
        max_positions=t,
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, t + 1))
    batch = contenders.lm_batch(ids)
    timed = alternate(
        {
            OURS: contenders.ours(config, "lora", batch, limit=limit),
            BLOCK: contenders.ours(config, "block", batch, limit=limit),
            PLAIN: _plain(config, batch, limit),
        },
        rounds,
    )
    return {"tokens": t, "limit_bytes": limit, **timed}


def _plain(config: DecoderConfig, batch: Any, limit: int) -> Contender:
    def attention(query, key, value, **options):
        del options  # this decoder has none
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    task = contenders.lm_task(config, batch)
    try:
        with mock.patch.object(decoder_block, "causal_attention", attention):
            return rivals.plain(task, limit=limit)
    except jax.errors.JaxRuntimeError as error:  # too large to compile, even
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Contender(None, 0.0, None, None, {})


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    names = (OURS, BLOCK, PLAIN)
    lines = [
        "| tokens | "
        + " | ".join(f"{name}: ms per step, temporaries" for name in names)
        + " | time / plain | temporaries / plain |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in rows:
        ours, plain = row[OURS], row[PLAIN]
        ratios = [
            f"{ours[key] / plain[key]:.2f}" if plain[key] else "–"
            for key in ("median_ms", "temp_bytes")
        ]
        cells = [f"{row['tokens']:,}", *(_cell(row[name]) for name in names), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    ms, bytes_ = found["median_ms"], found["temp_bytes"]
    if bytes_ is None:
        return "out of memory"
    time = "not run" if ms is None else f"{ms:,.{0 if ms >= 100 else 1}f}"
    return f"{time}, {bytes_ / 1e6:,.0f} MB"
