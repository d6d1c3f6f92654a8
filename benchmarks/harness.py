"""Timing contenders alternately in one process, keeping every sample.

Machines are shared and noisy, so the meaningful number is the ratio of two contenders
timed alternately; absolute times are reported beside it. The order is shuffled in each
round, because the preceding contender's threads and memory affect the next one.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.parallel.activation_sharding import target_platform

RESULTS = Path(__file__).parent / "results"
QUICK = "-quick"  # suffix of file names
UNMEASURED = ("compiled", "sweep_compiled")  # nothing runs here


class Contender(NamedTuple):
    """One implementation of the work.

    Attributes:
      run: runs it once and returns device arrays to wait for; None if it is too large
        to run.
      compile_seconds: compilation time.
      flops: from XLA's cost analysis, or None if that is incomplete.
      temp_bytes: XLA's temporaries, or None.
      facts: anything else to record (optimizer bytes, parameters).
    """

    run: Callable[[], Any] | None
    compile_seconds: float
    flops: float | None
    temp_bytes: int | None
    facts: dict[str, Any]


def measured(
    lowered: Any, run: Callable[[], Any], *, limit: int | None = None, **facts: Any
) -> Contender:
    """Compiles, records XLA's analysis of the program, and warms up.

    Args:
      lowered: a ``jax.stages.Lowered`` of the program that ``run`` calls.
      run: runs the work once.
      limit: maximum bytes of temporaries; a larger program is not run.
      **facts: further facts to record.

    Returns:
      The contender, ready to be timed.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    bytes_ = getattr(memory, "temp_size_in_bytes", None)
    fits = limit is None or bytes_ is None or bytes_ <= limit
    for _ in range(2 * fits):
        jax.block_until_ready(run())
    # On a GPU, matmuls are library calls, which XLA doesn't count.
    counted = None if jax.default_backend() == "gpu" else compiled.cost_analysis()
    flops = (counted or {}).get("flops")
    return Contender(run if fits else None, seconds, flops, bytes_, facts)


def alternate(
    contenders: Mapping[str, Contender], rounds: int, calls: int = 1
) -> dict[str, dict[str, Any]]:
    """Times all contenders alternately, in an order shuffled each round.

    Args:
      contenders: contenders by name.
      rounds: number of samples of each.
      calls: calls per sample.

    Returns:
      For each name its samples in milliseconds per call, median, quartiles, and XLA's
      analysis.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    runs = {name: contender.run for name, contender in contenders.items()}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(runs)).tolist():
            if (run := runs[name]) is None:
                continue
            start = time.perf_counter()
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
            samples[name].append((time.perf_counter() - start) / calls * 1e3)
    return {
        name: {
            **summary(samples[name]),
            "compile_seconds": round(contender.compile_seconds, 2),
            "flops": contender.flops,
            "temp_bytes": contender.temp_bytes,
            **contender.facts,
        }
        for name, contender in contenders.items()
    }


def summary(ms: list[float]) -> dict[str, Any]:
    """Returns samples in milliseconds with their median and quartiles."""
    if not ms:
        return {"ms": [], "median_ms": None, "quartiles_ms": None}
    return {
        "ms": [round(sample, 3) for sample in ms],
        "median_ms": round(float(np.median(ms)), 3),
        "quartiles_ms": np.percentile(ms, [25, 75]).round(3).tolist(),
    }


def is_on_cpu() -> bool:
    """Returns whether the benchmarks run on a CPU, or compile for one."""
    return target_platform() == "cpu"


def save(name: str, rows: list[dict[str, Any]], quick: bool = False) -> Path:
    """Writes one results file: device, versions, commit, date, all samples.

    Args:
      name: name of the comparison.
      rows: its measurements.
      quick: whether they are from ``--quick``; these go to a separate file, which the
        report ignores.

    Returns:
      The file.
    """
    device = jax.devices()[0]
    record = {
        "comparison": name,
        "command": f"python -m benchmarks {name}{' --quick' * quick}",
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "platform": device.platform,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": _versions(),
        "commit": commit(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    platform = f"-{device.platform}" * (name not in UNMEASURED)
    path = RESULTS / f"{name}{platform}{QUICK * quick}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _versions() -> dict[str, str]:
    """Returns the versions of the measured libraries that are installed."""
    found = {}
    libraries = ("jax", "flax", "numpy", "qwix", "torch", "transformers", "peft")
    for name in (*libraries, "libtpu", "jax-cuda12-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    """Returns the processor's name, and whether it has AVX-512 if known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    told = {key.strip(): value.strip() for key, value in facts.items()}
    name = told.get("model name", platform.machine())
    flags = told.get("flags", "").split()
    return f"{name} with AVX-512" if "avx512f" in flags else name


def commit() -> str:
    """Returns the current git commit, or "unknown"."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
