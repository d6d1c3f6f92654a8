"""How long a device waits for its next batch: a step of 20 ms, on real batches.

The step sleeps, in a few lines of C++ that XLA calls: like an accelerator it takes no
core from the host and no Python. It notes when it ends, and the host when it has handed
over the next step with its batch. A device waits where that is later: this is measured,
not the difference of two noisy times. Text is packed as by ``lora-jax train``. Needs
``g++``.
"""

import ctypes
import functools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.train.data import TextBatches
from lora_jax.train.loop import fit
from lora_jax.train.state import TrainState

STEP_MS, STEPS = 20, 50
SHAPES = ((8, 512), (16, 2048))
CODE = """
#include <time.h>
#include <unistd.h>
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static int Now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (t.tv_sec % 2000) * 1000000 + t.tv_nsec / 1000;
}
static ffi::Error Sleep(int us, ffi::AnyBuffer, ffi::ResultBuffer<ffi::S32> when) {
  when->typed_data()[0] = Now();
  usleep(us);
  when->typed_data()[1] = Now();
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(SleepStep, Sleep, ffi::Ffi::Bind()
    .Attr<int>("us").Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::S32>>());
"""
WRAP = 2_000_000_000  # us, where that clock begins again
Run = Callable[[], np.ndarray]  # [steps, 3]: when handed over, begun, ended, in us


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs `fit` on packed batches, on one batch, and waiting for each step.

    Args:
      quick: fewer samples.

    Returns:
      One row per shape of a batch.

    Raises:
      FileNotFoundError: if there is no ``g++``.
    """
    _register()
    return [_compare(*shape, 3 if quick else 9) for shape in SHAPES]


@functools.cache
def _register() -> None:
    """Compiles the step and makes it known to XLA."""
    if shutil.which("g++") is None:
        raise FileNotFoundError("this benchmark compiles its step: install g++.")
    folder = Path(tempfile.mkdtemp())
    (folder / "step.cc").write_text(CODE)
    words = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "step.cc"]
    words += ["-I", jax.ffi.include_dir(), "-o", "step.so"]
    subprocess.run(words, cwd=folder, check=True)
    call = ctypes.CDLL(str(folder / "step.so")).SleepStep
    jax.ffi.register_ffi_target("sleep_step", jax.ffi.pycapsule(call), platform="cpu")


def _compare(rows: int, length: int, rounds: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    examples = []
    for size in draw.integers(20, length // 2, 4 * rows * STEPS):
        ids = draw.integers(0, 32_000, size).astype(np.int32)
        examples.append({"input_ids": ids, "loss_mask": np.ones(size, np.int32)})
    batches = TextBatches(examples, rows, packed_length=length)
    ready = jax.device_put(batches.batch_at(0))
    runs: dict[str, Run] = {
        "fit": lambda: _fitting(batches.batch_at),
        "fit, one batch again and again": lambda: _fitting(lambda _: ready),
        "a loop that waits for each step": lambda: _waiting(batches.batch_at),
    }
    found: dict[str, dict[str, list[float]]] = {
        name: {"step_ms": [], "share": []} for name in runs
    }
    for number in range(1 + rounds):
        for name, run in runs.items():
            when = run()
            if number:  # not the first, which compiles
                step_ms, share = _idle(when)
                found[name]["step_ms"].append(step_ms)
                found[name]["share"].append(share)
    made = min(_seconds(batches, step) for step in range(1, 21))
    shape = f"{rows} x {length:,} tokens"
    return {"batch": shape, "batch_ms": round(1e3 * made, 3), **found}


def _idle(when: np.ndarray) -> tuple[float, float]:
    """Returns the mean time per step in ms, and the share of it spent waiting."""
    handed, begin, end = (when.astype(np.int64) - int(when[0, 1])).T
    handed, begin, end = (
        (x + WRAP // 2) % WRAP - WRAP // 2 for x in (handed, begin, end)
    )
    waits = np.maximum(handed[1:] - end[:-1], 0)
    total = int(end[-1] - begin[0])
    return total / len(when) / 1e3, float(np.sum(waits)) / total


def _fitting(batch_at: Any) -> np.ndarray:
    handed: list[int] = []
    times: list[jax.Array] = []

    def step(state: TrainState, batch: Any) -> Any:
        state, metrics, when = _step(state, batch)
        handed.append(_now())
        times.append(when)
        return state, metrics

    fit(_start(), step, batch_at, total_steps=STEPS)
    return np.column_stack([handed, np.array(times)])


def _waiting(batch_at: Any) -> np.ndarray:
    state, found = _start(), []
    for number in range(STEPS):
        state, _, when = _step(state, batch_at(number))
        handed = _now()
        found.append([handed, *np.asarray(when)])
    return np.array(found)


def _now() -> int:
    """Returns the time as the step notes it."""
    return time.monotonic_ns() // 1000 % WRAP


def _start() -> TrainState:
    return TrainState.create({"lora": jnp.zeros(1)}, optax.sgd(0.0), jax.random.key(0))


@jax.jit
def _step(state: TrainState, batch: Any) -> Any:
    """Depends on the step before and on the batch."""
    read: Any = sum(leaf[0, 0] for leaf in jax.tree.leaves(batch))
    sleep = jax.ffi.ffi_call("sleep_step", jax.ShapeDtypeStruct((2,), jnp.int32))
    square = jnp.full((64, 64), read + state.step, jnp.float32)
    work = square @ square  # some: XLA:CPU runs what looks cheap on the host's thread
    when: Any = sleep(work[:1, 0], us=np.int32(1000 * STEP_MS))
    following = state.step + 1 + 0 * when[1]
    metrics = {"loss": read, "weight": jnp.ones(()), "is_skipped": 0 * following}
    state = TrainState(frozen=state.frozen, **state.changing | {"step": following})
    return state, metrics, when


def _seconds(batches: TextBatches, step: int) -> float:
    start = time.perf_counter()
    batches.batch_at(step)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        f"{STEPS} steps of {STEP_MS} ms; the device waits where the host hands over "
        "the next one late:\n",
        "| batch | made in | with | ms a step, all told | the device waits "
        "(lowest to highest) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row.items():
            if isinstance(found, dict):
                shares = found["share"]
                lines.append(
                    f"| {row['batch']} | {row['batch_ms']:.2f} ms | {name} | "
                    f"{statistics.median(found['step_ms']):.2f} | "
                    f"{statistics.median(shares):.2%} ({min(shares):.2%}–"
                    f"{max(shares):.2%}) |"
                )
    return "\n".join(lines)
