"""The price of a training step: compiled from shapes alone, and never run."""

import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.parallel.mesh import batch_sharding
from lora_jax.plan.flops import traced_flops
from lora_jax.train.state import TrainState
from lora_jax.train.step import Batch, LossFn, TrainStep, make_train_step
from lora_jax.tree.paths import flatten

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How XLA says that a program does not fit, and how many bytes it wanted.
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    rf"(?:HLO temporaries|total memory required) \({_SIZE}i?B?\) exceeds available HBM",
    rf"Used {_SIZE}i?B? of \S+ hbm",
)


class StepPlan(NamedTuple):
    """What a step needs on each device.

    Attributes:
      devices: how many there are.
      batch: rows of the whole batch.
      tokens: of a row.
      remat: what a decoder's backward pass computes again; None of other models.
      base: bytes of frozen weights a device.
      trained: bytes of adapters, and of weights that are trained in full.
      optimizer: bytes of its state.
      other: bytes of the batch, counters and the layout's padding.
      temporaries: bytes of activations, gradients and workspace; None where the
        weights alone are too large and nothing was compiled.
      limit: bytes that a device has; ``sys.maxsize`` where nobody asked.
      fits: whether the step does: where XLA knows the device, whether it compiled.
      flops: of the whole step's products, as traced; 0 where nothing was compiled.
      compile_seconds: tracing, lowering and compiling; 0 where nothing was compiled.
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
        """Bytes a device in all."""
        parts = (self.base, self.trained, self.optimizer, self.other)
        return sum(parts) + (self.temporaries or 0)

    @property
    def parts(self) -> dict[str, Any]:
        """The bytes by what they are for, and ``total``, as JSON values."""
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
    """Prices the step that `make_train_step` would make; allocates nothing.

    Args:
      loss_fn: as `make_train_step` takes it.
      tx: the optimizer.
      variables: arrays or shapes, by collection.
      batch: arrays or shapes, of any number of rows.
      rows: of the batch to price.
      accumulate: microbatches of a step.
      where: shardings by the path of a variable, or by the end of it; None for those
        of the arrays.
      **options: of `price_step`.

    Returns:
      The plan; see `price_step`.
    """
    if where is None:
        where = {path: leaf.sharding for path, leaf in flatten(variables).items()}
    everywhere = by_rows = next(iter(where.values()))
    if isinstance(everywhere, NamedSharding):
        mesh: Any = everywhere.mesh
        everywhere, by_rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    state = _state_shapes(variables, tx, where, everywhere)
    shapes = {
        name: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]), leaf.dtype, sharding=by_rows
        )
        for name, leaf in batch.items()
    }
    step = make_train_step(loss_fn, tx, accumulate)
    return price_step(step, state, shapes, **options)


def price_step(
    step: TrainStep,
    state: TrainState,
    batch: Batch,
    *,
    limit: int | None = None,
    remat: str | None = None,
    even_if_too_large: bool = False,
) -> StepPlan:
    """Lowers and compiles one training step; says what it needs.

    Args:
      step: from `make_train_step`.
      state: arrays, or shapes with shardings, on devices that may be absent.
      batch: likewise, with ``input_ids`` ``[b, t]``.
      limit: bytes that a device has; None for a step that is to be run whatever it
        needs.
      remat: what is computed again, for the record.
      even_if_too_large: whether to compile what can't fit, for the weights alone are
        larger than ``limit``.

    Returns:
      The plan. A step that is too large is no error: the plan says so.

    Raises:
      jax.errors.JaxRuntimeError: if it doesn't compile: for another reason than its
        size, or without a ``limit``.
    """
    rows, tokens = batch["input_ids"].shape
    plan = StepPlan(
        devices=state.step.sharding.num_devices,
        batch=rows,
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
        # A TPU's compiler refuses what is too large, and says how large it is.
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
    """Returns the bytes on one device of arrays, or of shapes with shardings."""

    def own(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)  # of NumPy's arrays none
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


def parse_too_large(message: str) -> int | None:
    """Reads the bytes that a step wants from XLA's refusal, None if it is another.

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
    """Returns what `TrainState.create` would, as shapes; nothing is allocated.

    What the optimizer keeps of a leaf lies where the leaf does, all else in
    ``otherwise``.
    """
    state = jax.eval_shape(
        lambda variables, key: TrainState.create(variables, tx, key),
        dict(variables),
        jax.random.key(0),
    )

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        sharding = next((where[end] for end in ends if end in where), otherwise)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)
