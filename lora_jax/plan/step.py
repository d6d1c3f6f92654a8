"""The price of a decoder's training step, from shapes alone.

The step is the real one, `make_train_step` over `make_lm_loss`, lowered for abstract
arrays with their shardings and compiled for devices that need not be there. No weight
is ever made.
"""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax.config import LoRAConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.stacking import can_scan
from lora_jax.names import PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.mesh import batch_sharding, check_rows
from lora_jax.parallel.rules import (
    Rules,
    WeightSharding,
    adapter_shardings,
    make_sharding,
    resolve_shardings,
)
from lora_jax.plan.flops import StepFlops, step_flops
from lora_jax.plan.slices import uncached
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step
from lora_jax.tree.paths import flatten, key_path

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# How XLA says that a program does not fit: what it wanted, and what there was.
_TOO_LARGE = (
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"total memory required \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
      config: the decoder's sizes.
      lora: its adapters.
      tokens: of a row, ``t``.
      dtype: of the computation.
      param_dtype: of the frozen weights.
      remat: what the backward pass computes again; see `Decoder`.
      accumulate: microbatches of a step.
      scan_layers: whether the blocks are one scanned block; None: where they are alike.
      rules: of the mesh, as `make_sharding` takes them.
      uneven: likewise.
    """

    config: DecoderConfig
    lora: LoRAConfig
    tokens: int
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    remat: str = "block"
    accumulate: int = 1
    scan_layers: bool | None = None
    rules: Rules = ()
    uneven: Literal["error", "replicate"] = "error"

    @property
    def adapted(self) -> Adapted:
        """The decoder with adapters."""
        scan = self.scan_layers
        if scan is None:
            scan = can_scan(self.lora, self.config)
        decoder = Decoder(
            self.config,
            dtype=self.dtype,
            scan_layers=scan,
            remat=self.remat,
        )
        return adapt(decoder, self.lora)

    def params(self) -> dict[str, Any]:
        """Returns the shapes of the frozen weights, a plain nested dictionary."""
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(self.adapted.model.init, jax.random.key(0), ids)

        def typed(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, self.param_dtype)

        return jax.tree.map(typed, shapes[PARAMS])


class StepPlan(NamedTuple):
    """What a step needs on each device.

    Attributes:
      devices: how many there are.
      batch: rows of the whole batch.
      tokens: of a row.
      remat: what the backward pass computes again.
      base: bytes of frozen weights a device.
      trained: bytes of adapters, and of weights that are trained in full.
      optimizer: bytes of its state.
      other: bytes of the batch, counters and the layout's padding.
      temporaries: bytes of activations, gradients and workspace; None where the
        weights alone are too large and nothing was compiled.
      limit: bytes that a device has.
      fits: whether the step does: where XLA knows the device, whether it compiled.
      flops: of the whole step, by formula.
      compile_seconds: lowering and compiling; 0 where nothing was compiled.
    """

    devices: int
    batch: int
    tokens: int
    remat: str
    base: int
    trained: int
    optimizer: int
    other: int
    temporaries: int | None
    limit: int
    fits: bool
    flops: StepFlops
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes a device in all."""
        parts = (self.base, self.trained, self.optimizer, self.other)
        return sum(parts) + (self.temporaries or 0)


def plan_step(work: Workload, mesh: Mesh, batch: int, *, limit: int) -> StepPlan:
    """Lowers and compiles one training step; says what it needs.

    Args:
      work: what is trained.
      mesh: from `make_mesh`, of devices that may be absent.
      batch: rows of the whole batch.
      limit: bytes of memory that a device has.

    Returns:
      The plan. A step that is too large is no error: the plan says so.

    Raises:
      ValueError: if the batch or a weight doesn't divide over the mesh, or the config
        names layers that aren't there.
    """
    check_rows({"batch": batch}, mesh, accumulate=work.accumulate)
    adapted, params = work.adapted, work.params()
    tx = lora_optimizer(1e-4, total_steps=1000)
    sharding = make_sharding(mesh, work.rules, uneven=work.uneven)
    state = abstract_state(adapted, params, tx, sharding)
    rows = batch_sharding(mesh)
    tokens = (batch, work.tokens)
    examples = {
        "input_ids": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=rows),
        "labels": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=rows),
        "weights": jax.ShapeDtypeStruct(tokens, jnp.float32, sharding=rows),
    }
    parts = {
        "base": device_bytes(state.frozen),
        "trained": device_bytes(state.trainable),
        "optimizer": device_bytes(state.opt_state),
        "other": device_bytes(examples),
    }
    known = sum(parts.values())
    temporaries, fits, seconds = None, known <= limit, 0.0
    if fits:
        cfg = work.config
        loss = make_lm_loss(adapted, is_tied=cfg.is_tied, softcap=cfg.final_softcap)
        step = make_train_step(loss, tx, work.accumulate)
        start = time.perf_counter()
        arguments, temporaries, fits = _compile(step.lower(state, examples))
        seconds = time.perf_counter() - start
        if arguments is not None:
            parts["other"] += max(0, arguments - known)
        fits = fits and sum(parts.values()) + temporaries <= limit
    return StepPlan(
        devices=mesh.size,
        batch=batch,
        tokens=work.tokens,
        remat=work.remat,
        **parts,
        temporaries=temporaries,
        limit=limit,
        fits=fits,
        flops=step_flops(
            work.config, params, adapted.targets(params), batch, work.tokens, work.remat
        ),
        compile_seconds=seconds,
    )


def abstract_state(
    adapted: Adapted, params: Any, tx: Any, sharding: WeightSharding
) -> TrainState:
    """Returns the state before the first step, as shapes with shardings.

    Args:
      adapted: the model.
      params: shapes of its frozen weights.
      tx: the optimizer.
      sharding: of the base's weights on a mesh.

    Returns:
      As `state_shapes`.

    Raises:
      ValueError: naming every weight that the mesh doesn't divide.
    """
    variables = jax.eval_shape(adapted.attach, params, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    where = resolve_shardings(shapes, sharding)
    where |= adapter_shardings(where, adapted.targets(params))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return state_shapes(variables, tx, where, everywhere)


def state_shapes(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    where: Mapping[str, Sharding],
    otherwise: Sharding,
) -> TrainState:
    """Returns what `TrainState.create` would, as shapes; nothing is allocated.

    Args:
      variables: arrays or shapes, by collection.
      tx: the optimizer.
      where: shardings by the path of a variable, or by the end of it.
      otherwise: the sharding of all else.

    Returns:
      A `TrainState` of ``jax.ShapeDtypeStruct``: what the optimizer keeps of a leaf
      lies where the leaf does.
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


def device_bytes(tree: Any) -> int:
    """Returns the bytes on one device of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total


def fitting_remat(plans: Sequence[StepPlan]) -> str | None:
    """Returns the first policy whose step fits, None if none does."""
    return next((plan.remat for plan in plans if plan.fits), None)


def parse_too_large(message: str) -> tuple[int, int] | None:
    """Reads bytes wanted and bytes there from XLA's refusal, None if it is another.

    Example:
      >>> parse_too_large("Used 20.50G of 15.75G hbm.") == (20.5 * 2**30, 15.75 * 2**30)
      True
    """
    for pattern in _TOO_LARGE:
        if found := re.search(pattern, message):
            wanted, unit, limit, limit_unit = found.groups()
            return (
                round(float(wanted) * UNITS[unit]),
                round(float(limit) * UNITS[limit_unit]),
            )
    return None


def _compile(lowered: Any) -> tuple[int | None, int, bool]:
    """Compiles; returns bytes of arguments (if known) and temporaries, and if it fits.

    A TPU's compiler refuses what is too large for the chip, and says how large it is.
    """
    try:
        with uncached():
            memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        too_large = parse_too_large(str(error))
        if too_large is None:
            raise
        return None, too_large[0], False
    arguments = int(memory.argument_size_in_bytes)
    return arguments, int(memory.temp_size_in_bytes), True
