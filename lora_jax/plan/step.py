"""Memory and FLOPs of a training step, compiled from shapes without running it."""

import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax.parallel.mesh import batch_sharding
from lora_jax.plan.flops import traced_flops
from lora_jax.train.slots import Members
from lora_jax.train.state import TrainState
from lora_jax.train.step import Batch, LossFn, TrainStep, make_train_step
from lora_jax.tree.paths import flatten, key_path

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA's errors for a program that does not fit, with the bytes it needs.
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    rf"(?:HLO temporaries|total memory required) \({_SIZE}i?B?\) exceeds available HBM",
    rf"Used {_SIZE}i?B? of \S+ hbm",
)


class StepPlan(NamedTuple):
    """The requirements of a step, in bytes per device.

    Attributes:
      devices: number of devices.
      batch: rows of the whole batch.
      tokens: tokens per row.
      remat: a decoder's rematerialisation policy; None for other models.
      base: frozen weights.
      trained: adapters and weights trained in full.
      optimizer: optimizer state.
      other: the batch, counters and layout padding.
      temporaries: activations, gradients and workspace; None if the weights alone are
        too large, so nothing was compiled.
      limit: memory of a device; ``sys.maxsize`` if no limit was given.
      fits: whether the step fits; if XLA knows the device's memory, whether it
        compiled.
      flops: traced FLOPs of the whole step; 0 if nothing was compiled.
      compile_seconds: time to trace, lower and compile; 0 if nothing was compiled.
    """

    devices: int
    batch: int
    tokens: int
    remat: str | None
    base: int
    trained: int
    optimizer: int
    other: int
    temporaries: int | None
    limit: int
    fits: bool
    flops: float
    compile_seconds: float

    @property
    def total(self) -> int:
        """Total bytes per device."""
        parts = (self.base, self.trained, self.optimizer, self.other)
        return sum(parts) + (self.temporaries or 0)

    @property
    def parts(self) -> dict[str, Any]:
        """The bytes by category, and ``total``, as JSON values."""
        names = ("base", "trained", "optimizer", "other", "temporaries", "total")
        return {name: getattr(self, name) for name in names}


def price_training(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    rows: int,
    *,
    accumulate: int = 1,
    where: Mapping[str, Sharding] | None = None,
    **options: Any,
) -> StepPlan:
    """Plans the step that `make_train_step` would make; allocates nothing.

    Args:
      loss_fn: as for `make_train_step`.
      tx: the optimizer.
      variables: arrays or shapes, by collection.
      batch: arrays or shapes, with any number of rows.
      rows: rows of the batch to plan for.
      accumulate: microbatches per step.
      where: shardings by a variable's path or the end of it; None for those of the
        arrays.
      **options: passed to `price_step`.

    Returns:
      The plan; see `price_step`.
    """
    if where is None:
        where = {path: leaf.sharding for path, leaf in flatten(variables).items()}
    everywhere = next(iter(where.values()))
    mesh: Any = None
    if isinstance(everywhere, NamedSharding):
        mesh = everywhere.mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
    state = _state_shapes(variables, tx, where, everywhere)
    step = make_train_step(loss_fn, tx, accumulate)
    shapes = batch_shapes(batch, rows, mesh, otherwise=everywhere)
    return price_step(step, state, shapes, **options)


def batch_shapes(
    batch: Mapping[str, Any],
    rows: int,
    mesh: Mesh | None,
    *,
    otherwise: Sharding | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch's shapes with another number of rows, sharded over a mesh.

    Args:
      batch: arrays or shapes.
      rows: the number.
      mesh: the mesh, or None.
      otherwise: the sharding without a mesh.
    """
    return {
        name: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]),
            leaf.dtype,
            sharding=batch_sharding(mesh, len(leaf.shape)) if mesh else otherwise,
        )
        for name, leaf in batch.items()
    }


def price_step(
    step: TrainStep | Members,
    state: TrainState,
    batch: Batch,
    *,
    limit: int | None = None,
    remat: str | None = None,
    even_if_too_large: bool = False,
) -> StepPlan:
    """Lowers and compiles one training step and returns its plan.

    Args:
      step: from `make_train_step`, or that of a sweep.
      state: arrays, or shapes with shardings on devices that may be absent.
      batch: likewise, with ``input_ids`` ``[b, t]``, or ``[m, b, t]`` of a sweep.
      limit: memory of a device in bytes; None for no limit.
      remat: the rematerialisation policy, recorded in the plan.
      even_if_too_large: whether to compile even if the weights alone exceed ``limit``.

    Returns:
      The plan. A step that is too large is not an error: the plan does not fit.

    Raises:
      jax.errors.JaxRuntimeError: if compilation fails without a ``limit``, or for
        another reason than memory.
    """
    *rows, tokens = batch["input_ids"].shape
    plan = StepPlan(
        devices=state.step.sharding.num_devices,
        batch=math.prod(rows),
        tokens=tokens,
        remat=remat,
        base=device_bytes(state.frozen),
        trained=device_bytes(state.trainable),
        optimizer=device_bytes(state.opt_state),
        other=device_bytes(batch),
        temporaries=None,
        limit=sys.maxsize if limit is None else limit,
        fits=False,
        flops=0.0,
        compile_seconds=0.0,
    )
    if plan.total > plan.limit and not even_if_too_large:
        return plan
    start = time.perf_counter()
    traced = step.trace(state, batch)
    refused = None
    try:
        memory: Any = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler rejects programs that are too large, and reports their size.
        refused = limit and parse_too_large(str(error))
        if not refused:
            raise
        arguments, temporaries = 0, refused
    else:
        arguments = int(memory.argument_size_in_bytes)
        temporaries = int(memory.temp_size_in_bytes)
    plan = plan._replace(
        other=plan.other + max(0, arguments - plan.total),
        temporaries=temporaries,
        flops=traced_flops(traced.jaxpr.jaxpr),
        compile_seconds=time.perf_counter() - start,
    )
    return plan._replace(fits=not refused and plan.total <= plan.limit)


def device_bytes(tree: Any) -> int:
    """Returns the bytes per device of arrays, or of shapes with shardings."""

    def own(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)  # NumPy arrays have none
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


def parse_too_large(message: str) -> int | None:
    """Parses the bytes needed from XLA's out-of-memory error; None for other errors.

    Example:
      >>> parse_too_large("Used 20.50G of 15.75G hbm.") == 20.5 * 2**30
      True
    """
    for pattern in _TOO_LARGE:
        if found := re.search(pattern, message):
            wanted, unit = found.groups()
            return round(float(wanted) * UNITS[unit])
    return None


def _state_shapes(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    where: Mapping[str, Sharding],
    otherwise: Sharding,
) -> TrainState:
    """Returns the result of `TrainState.create` as shapes, allocating nothing.

    Optimizer leaves get the shardings of their parameters, other leaves ``otherwise``.
    """
    state = jax.eval_shape(
        lambda variables, key: TrainState.create(variables, tx, key),
        dict(variables),
        jax.random.key(0),
    )

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        parts = key_path(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        sharding = next((where[end] for end in ends if end in where), otherwise)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)
