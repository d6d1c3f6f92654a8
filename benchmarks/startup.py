"""Time before the first step: imports, compiling by depth, `lora-jax train`.

Each import and each training job is a separate process. Compilation is timed without
JAX's persistent cache; the jobs use it, and the first one, which fills it, is reported
separately.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import contenders, harness
from lora_jax import LoRAConfig, TrainState, adapt, make_lm_loss, make_train_step
from lora_jax.models.decoder import Decoder

DEPTHS = (8, 32)
BASE = "import jax, flax.linen, optax"
OURS = (
    "; import lora_jax; lora_jax.adapt, lora_jax.lora_dense, lora_jax.make_train_step"
)
JOB = """
model: {path: model}
data: {train: data.jsonl, holdout: 0.1}
lora: {rank: 4}
train: {epochs: 1, batch_size: 8, log_every: 1}
output: {dir: run}
"""


def main(quick: bool) -> list[dict[str, Any]]:
    """Times imports, compilation and jobs, alternating within each.

    Args:
      quick: two samples of each.

    Returns:
      One row per question: the samples by name.
    """
    rounds = 2 if quick else 7
    imports = {
        BASE: lambda: _import(BASE),
        "with lora_jax": lambda: _import(BASE + OURS),
    }
    compiling = {f"{n} layers": lambda n=n: _compile(n) for n in DEPTHS}
    for run in (*imports.values(), *compiling.values()):
        run()  # warms up the disk cache, and JAX's in-process caches
    return [
        {"what": "importing", **_turns(imports, rounds)},
        {"what": "compiling a step", **_turns(compiling, rounds)},
        {"what": "`lora-jax train` to its first step", **_jobs(rounds)},
    ]


def _turns(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            samples[name].append(1e3 * run())
    return {name: harness.summary(ms) for name, ms in samples.items()}


def _import(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def _compile(layers: int) -> float:
    """Lowers and compiles a step of a scanned decoder: d 128, 4 x 256 tokens."""
    config = dataclasses.replace(
        contenders.CONFIG,
        num_layers=layers,
        layer_ropes=(0,) * layers,
        layer_windows=(None,) * layers,
        hidden_size=128,
        num_heads=2,
        num_kv_heads=2,
        mlp_size=352,
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, 257))
    batch = contenders.lm_batch(ids)
    model = Decoder(config, scan_layers=True, remat="lora")
    adapted = adapt(model, LoRAConfig(rank=8), batch["input_ids"])
    params = contenders.init(model, batch["input_ids"])
    variables = adapted.attach(params, jax.random.key(1))
    tx = optax.adam(1e-3)
    state = TrainState.create(variables, tx, jax.random.key(0))
    step = make_train_step(make_lm_loss(adapted, is_tied=False), tx)
    start = time.perf_counter()
    step.lower(state, batch).compile()
    return time.perf_counter() - start


def _jobs(rounds: int) -> dict[str, Any]:
    """Trains a tiny decoder in processes that share a compilation cache."""
    from tests.tiny_decoder import make_decoder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_decoder(folder / "model")
        line = json.dumps({"prompt": "what is the sky ? ", "completion": "blue ."})
        (folder / "data.jsonl").write_text(f"{line}\n" * 64)
        (folder / "job.yaml").write_text(JOB)
        first, *later = (1e3 * _first_step(folder) for _ in range(rounds + 1))
    return {
        "cache of compiled programs empty": harness.summary([first]),
        "cache warm": harness.summary(later),
    }


def _first_step(folder: Path) -> float:
    """Returns the seconds from the command to the first training step's metrics."""
    environment = {**os.environ, "LORA_JAX_CACHE": str(folder / "cache")}
    words = ("-m", "lora_jax.cli.main", "train", "job.yaml", "--overwrite")
    metrics = folder / "run" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    job = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = None
    while job.poll() is None:
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):
            if seconds is None and '"split": "train"' in metrics.read_text():
                seconds = time.perf_counter() - start
    if job.returncode or seconds is None:
        raise RuntimeError(f"the job ended with status {job.returncode}.")
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| | | seconds (quartiles) | against the first |", "|---|---|---|---|"]
    for row in rows:
        timed = {name: found for name, found in row.items() if name != "what"}
        first = next(iter(timed.values()))["median_ms"]
        for name, found in timed.items():
            median, (low, high) = found["median_ms"], found["quartiles_ms"]
            lines.append(
                f"| {row['what']} | {name} | {median / 1e3:.2f} ({low / 1e3:.2f}–"
                f"{high / 1e3:.2f}) | {(median - first) / 1e3:+.2f} s, x "
                f"{median / first:.2f} |"
            )
    return "\n".join(lines)
