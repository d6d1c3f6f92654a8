"""How long a device waits for its next batch: a step that sleeps, on real batches.

The step stands for 20 ms of an accelerator's work: it is dispatched, and sleeps in a
thread of XLA's, so the host is as free as beside a device. Text is encoded and packed
as by ``lora-jax train``; `fit` makes each batch while the step before is at work.
"""

import dataclasses
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
    timed = {
        "fit": _fitting(batches.batch_at),
        "fit, one batch again and again": _fitting(lambda _: ready),
        "a loop that waits for each step": _waiting(batches.batch_at),
    }
    shape = f"{rows} x {length:,} tokens"
    made = min(_seconds(batches, step) for step in range(1, 21))
    return {
        "batch": shape,
        "batch_ms": round(1e3 * made, 3),
        **alternate(timed, rounds),
    }


def _fitting(batch_at: Any) -> Contender:
    def run() -> Any:
        return fit(_start(), _step, batch_at, total_steps=STEPS).state.step

    run()
    return Contender(run, 0.0, None, None, {})


def _waiting(batch_at: Any) -> Contender:
    def run() -> Any:
        state = _start()
        for number in range(STEPS):
            state, metrics = _step(state, batch_at(number))
            jax.block_until_ready(metrics)
        return state.step

    return Contender(run, 0.0, None, None, {})


def _start() -> TrainState:
    return TrainState.create({"lora": jnp.zeros(1)}, optax.sgd(0.0), jax.random.key(0))


@jax.jit
def _step(state: TrainState, batch: Any) -> Any:
    """Depends on the step before and on the whole batch."""
    read = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(batch))
    number = jax.pure_callback(_sleep, jnp.zeros((), jnp.int32), state.step, read)
    weight = jnp.ones(())
    metrics = {"loss": read, "weight": weight, "is_skipped": jnp.zeros((), jnp.int32)}
    return dataclasses.replace(state, step=number), metrics


def _sleep(number: Any, read: Any) -> np.ndarray:
    del read
    time.sleep(STEP_MS / 1e3)
    return np.asarray(number + 1, np.int32)


def _seconds(batches: TextBatches, step: int) -> float:
    start = time.perf_counter()
    batches.batch_at(step)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        f"{STEPS} steps that take {STEP_MS:.0f} ms of a device's time:\n",
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
