"""This machine: the memory of its devices, and steps priced for them."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_jax.parallel.mesh import batch_sharding, mesh_of
from lora_jax.plan.step import StepPlan, price_step, state_shapes
from lora_jax.train.step import LossFn, make_train_step
from lora_jax.tree.paths import flatten


def device_memory(device: Any) -> int:
    """Returns the bytes of memory that a device can hold arrays in.

    Args:
      device: a `jax.Device` of this machine.

    Returns:
      What its allocator may take; of a CPU the machine's memory.
    """
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def price_local(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    rows: int,
    *,
    accumulate: int = 1,
    **options: Any,
) -> StepPlan:
    """Prices a step on the devices that its variables lie on; allocates nothing.

    Args:
      loss_fn: as `make_train_step` takes it.
      tx: the optimizer.
      variables: arrays, by collection; of their optimizer nothing is made.
      batch: arrays of any number of rows, on the host.
      rows: of the batch to price.
      accumulate: microbatches of a step.
      **options: of `price_step`.

    Returns:
      The plan.
    """
    mesh = mesh_of(variables)
    if mesh is None:
        everywhere = by_rows = SingleDeviceSharding(jax.local_devices()[0])
    else:
        everywhere = NamedSharding(mesh, PartitionSpec())
        by_rows = batch_sharding(mesh)
    where = {path: leaf.sharding for path, leaf in flatten(variables).items()}
    shapes = {
        name: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]), leaf.dtype, sharding=by_rows
        )
        for name, leaf in batch.items()
    }
    state = state_shapes(variables, tx, where, everywhere)
    step = make_train_step(loss_fn, tx, accumulate)
    return price_step(step, state, shapes, **options)
