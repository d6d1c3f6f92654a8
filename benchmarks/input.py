"""How long a device waits for its next batch: a step of 20 ms, on real batches.

The step is a loop of XLA's that needs one core and not Python, as an accelerator would;
the host has another. Text is packed as by ``lora-jax train``; `fit` makes each batch
while the step before is at work.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Contender, alternate
from lora_jax.train.data import TextBatches
from lora_jax.train.loop import fit
from lora_jax.train.state import TrainState

STEP_MS, STEPS = 20.0, 50
SHAPES = ((8, 512), (16, 2048))


def main(quick: bool) -> list[dict[str, Any]]:
    """Times `fit` on packed batches, on one batch, and waiting for each step.

    Args:
      quick: fewer samples.

    Returns:
      One row per shape of a batch.
    """
    return [_compare(*shape, 3 if quick else 9) for shape in SHAPES]


def _compare(rows: int, length: int, rounds: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    examples = []
    for size in draw.integers(20, length // 2, 4 * rows * STEPS):
        ids = draw.integers(0, 32_000, size).astype(np.int32)
        examples.append({"input_ids": ids, "loss_mask": np.ones(size, np.int32)})
    batches = TextBatches(examples, rows, packed_length=length)
    ready = jax.device_put(batches.batch_at(0))
    turns = _calibrated()
    timed = {
        "fit": _fitting(batches.batch_at, turns),
        "fit, one batch again and again": _fitting(lambda _: ready, turns),
        "a loop that waits for each step": _waiting(batches.batch_at, turns),
    }
    shape = f"{rows} x {length:,} tokens"
    made = min(_seconds(batches, step) for step in range(1, 21))
    return {
        "batch": shape,
        "batch_ms": round(1e3 * made, 3),
        **alternate(timed, rounds),
    }


def _fitting(batch_at: Any, turns: int) -> Contender:
    step = functools.partial(_step, turns=turns)

    def run() -> Any:
        return fit(_start(), step, batch_at, total_steps=STEPS).state.step

    run()
    return Contender(run, 0.0, None, None, {})


def _waiting(batch_at: Any, turns: int) -> Contender:
    def run() -> Any:
        state = _start()
        for number in range(STEPS):
            state, metrics = _step(state, batch_at(number), turns)
            jax.block_until_ready(metrics)
        return state.step

    return Contender(run, 0.0, None, None, {})


def _start() -> TrainState:
    return TrainState.create({"lora": jnp.zeros(1)}, optax.sgd(0.0), jax.random.key(0))


@jax.jit
def _step(state: TrainState, batch: Any, turns: Any) -> Any:
    """Depends on the step before and on the whole batch."""
    read: Any = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(batch))
    spent = _spend(state.step + 0 * read.astype(jnp.int32), turns)
    weight = jnp.ones(())
    metrics = {"loss": read, "weight": weight, "is_skipped": jnp.zeros((), jnp.int32)}
    return dataclasses.replace(state, step=spent + 1), metrics


@jax.jit
def _spend(step: Any, turns: Any) -> Any:
    """Returns the step's number after some work."""
    start = jnp.full(64, step, jnp.float32)
    end = jax.lax.fori_loop(0, turns, lambda _, x: jnp.cos(x), start)
    return step + (end[0] > 2).astype(jnp.int32)


def _calibrated() -> int:
    """Returns the turns that take `STEP_MS`."""
    few = 10_000
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(_spend(jnp.zeros((), jnp.int32), few))
        seconds.append(time.perf_counter() - start)
    return int(few * STEP_MS / 1e3 / float(np.median(seconds)))


def _seconds(batches: TextBatches, step: int) -> float:
    start = time.perf_counter()
    batches.batch_at(step)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        f"{STEPS} steps of about {STEP_MS:.0f} ms:\n",
        "| batch | made in | with | ms a step (quartiles) | the device waits |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        floor = row["fit, one batch again and again"]["median_ms"]
        for name, found in row.items():
            if isinstance(found, dict):
                low, high = (each / STEPS for each in found["quartiles_ms"])
                share = 1 - floor / found["median_ms"]
                lines.append(
                    f"| {row['batch']} | {row['batch_ms']:.2f} ms | {name} | "
                    f"{found['median_ms'] / STEPS:.2f} ({low:.2f}–{high:.2f}) | "
                    f"{share:.1%} |"
                )
    return "\n".join(lines)
