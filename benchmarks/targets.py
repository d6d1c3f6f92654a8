"""Compiling a contender's step for a chip that is not here, and reading the program.

A TPU's compiler is libtpu, a GPU's is XLA's CUDA plugin; neither needs the device. What
a GPU's program says lacks the search for the fastest matmul kernel, which runs on the
device, and cuDNN's attention.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import contenders, rivals
from benchmarks.gpu_schedule import COST_MODEL, sum_kernels
from benchmarks.harness import Contender
from benchmarks.rivals import Task
from benchmarks.schedule import sum_cycles
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.plan.flops import traced_flops
from lora_jax.plan.slices import open_slice, uncached
from lora_jax.plan.step import parse_too_large

Make = Callable[[Task], Contender]
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # its data sheet, as XLA's GpuTargetConfigProto


def open_target(name: str) -> Any:
    """Returns a device to compile for.

    Args:
      name: a TPU slice, as `lora-jax plan --topology` takes it, or ``"h100"``.

    Returns:
      Its first chip.

    Raises:
      ValueError: if there is no such target.
      ModuleNotFoundError: if its compiler is not installed.
    """
    if name != "h100":
        return open_slice(name)[0]
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ModuleNotFoundError(
            "compiling for a GPU needs XLA's plugin, not CUDA: pip install --no-deps "
            "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12.",
            name="jax_cuda12_plugin",
        )
    config = {"target_config": H100, "topology": "1x1x1"}
    return topologies.get_topology_desc(name, "cuda", **config).devices[0]


def price(make: Make, task: Task, mesh: Mesh) -> dict[str, Any]:
    """Compiles a contender's step for the first device of a mesh.

    Args:
      make: makes the contender, as on a device that is here.
      task: its model, whose parameters may be shapes, and its batch.
      mesh: of the device to compile for.

    Returns:
      ``flops`` of the matmuls as traced, ``temp_bytes``, ``argument_bytes``,
      ``output_bytes`` and ``compile_seconds``; of a TPU ``bytes_accessed`` (a loop's
      body counts once), ``cycles`` and the ``unknown`` kernels outside them (none
      of them where libtpu can't print the program), of a GPU
      ``launches``, ``microseconds`` and the ``unknown`` kernels. Of a step that is too
      large only ``refused_bytes``, what it needs.
    """
    traced = trace(make, task, mesh)
    lowered = traced.lower()
    platform = mesh.devices.item().platform
    start = time.perf_counter()
    try:
        with uncached():
            compiled = lowered.compile(COST_MODEL if platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if needed := parse_too_large(str(error)):
            return {"refused_bytes": needed}
        raise
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return {
        "flops": traced_flops(traced.jaxpr.jaxpr),
        **_scheduled(compiled, platform),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def _scheduled(compiled: Any, platform: str) -> dict[str, Any]:
    if platform not in ("tpu", "gpu"):
        return {}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 for v6e: an async instruction
        return {}
    if platform == "gpu":
        return sum_kernels(text)._asdict()
    found, cost = sum_cycles(text), compiled.cost_analysis()
    return {
        "bytes_accessed": cost["bytes accessed"],
        "cycles": found.total,
        "unknown": found.unknown,
    }


def trace(make: Make, task: Task, mesh: Mesh) -> jax.stages.Traced:
    """Traces the step that a contender would run; see `price`."""
    place = NamedSharding(mesh, PartitionSpec())
    found = []

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=place)

    def capture(step: Any, *args: Any, **facts: Any) -> Contender:
        found.append((step, jax.tree.map(shape, args)))
        return Contender(None, 0.0, None, None, facts)

    def build(params: Any) -> None:
        make(task._replace(params=params))

    with (
        on_mesh_of(mesh),
        mock.patch.object(rivals, "stepper", capture),
        mock.patch.object(rivals, "repeater", capture),
        mock.patch.object(contenders, "stepper", capture),
    ):
        jax.eval_shape(build, task.params)
        ((step, args),) = found
        return step.trace(*args)
