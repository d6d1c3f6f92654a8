"""The training step: gradients of only the trainable collections.

W0 is an argument of the compiled function, not a closure constant, and is never
differentiated, donated or returned. The donated buffers (adapters, optimizer state,
counters) are reused for the results.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.names import DROPOUT, EXPERTS
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import mesh_of, whole_over_batch
from lora_jax.train.state import TrainState
from lora_jax.tree.paths import key_path, leaves_by_path

Batch = PyTree
Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]]

OWN_METRICS = ("loss", "weight", "grad_norm", "is_skipped")


class TrainStep:
    """A compiled training step; made by `make_train_step`.

    On a mesh, the returned state has the shardings of the input state.

    Attributes:
      function: the pure ``(own, frozen, batch) -> (own, metrics)``, where ``own`` is
        ``state.changing``; to be vmapped, for instance.
      update: the same jitted, donating ``own``; for a state on one device.
    """

    def __init__(self, updated: Callable[..., Any]) -> None:
        def update(own, frozen, batch, summed=None, mesh=None):
            with on_mesh_of(mesh):
                return updated(own, frozen, batch, summed)

        self.update: Any = jax.jit(update, donate_argnums=0)
        self.function = update
        self._sharded: dict[tuple[Any, ...], Any] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs one step; donates ``state`` except for its frozen part."""
        update = self.update_for(state)
        own, metrics = update(state.changing, state.frozen, batch)
        return TrainState(frozen=state.frozen, **own), metrics

    def update_for(self, state: TrainState) -> Any:
        """Returns the jitted function for the devices of a state."""
        mesh = mesh_of(state.step)
        if mesh is None:
            return self.update
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.changing)
        known = tuple(jax.tree.leaves(shardings))
        if known not in self._sharded:
            scalars = NamedSharding(mesh, PartitionSpec())
            summed = jax.tree_util.tree_map_with_path(
                _summed_as, shardings["trainable"]
            )
            self._sharded[known] = jax.jit(
                functools.partial(self.function, summed=summed, mesh=mesh),
                donate_argnums=0,
                out_shardings=(shardings, scalars),
            )
        return self._sharded[known]

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Traces without running, for a state and batch of arrays or shapes."""
        return self.update_for(state).trace(state.changing, state.frozen, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lowers without running; see `trace`."""
        return self.trace(state, batch).lower()


def _summed_as(path: Any, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding in which a gradient is summed over the batch.

    Those of experts are many, and come summed from each layer: they are split at once.
    """
    is_of_experts = EXPERTS in key_path(path).split("/")
    return sharding if is_of_experts else whole_over_batch(sharding)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, accumulate: int = 1
) -> TrainStep:
    """Builds the compiled step ``(state, batch) -> (state, metrics)``.

    With gradient accumulation over microbatches ``k``, the gradient is
    ``Σ_k ∇ loss_sum_k / Σ_k weight_k``, summed in float32: equal to that of the whole
    batch however the weights are distributed. A step whose loss or gradient norm is not
    finite (including total weight 0) leaves adapters and optimizer unchanged and is
    counted in ``state.skipped``. Nothing is copied to the host.

    Collections other than ``lora`` and ``params`` (e.g. ``batch_stats``) are read but
    never updated.

    Args:
      loss_fn: ``(variables, batch, rngs) -> (loss_sum, weight, metrics)``; ``metrics``
        maps names to sums over the same weights; ``rngs`` is ``{"dropout": key}``, with
        a different key for each step and microbatch.
      tx: the optimizer passed to `TrainState.create`.
      accumulate: number of microbatches; microbatch ``k`` holds rows ``k``,
        ``k + accumulate``, ... of every leaf of the batch.

    Returns:
      The step. Its metrics are device scalars: ``loss`` (mean), ``weight``,
      ``grad_norm``, ``is_skipped`` (0 or 1), and the means of ``loss_fn``'s metrics.

    Raises:
      ValueError: if ``accumulate`` is below 1. On the first call for a shape: if the
        batch size is not divisible by it, or ``loss_fn``'s result is invalid.

    Example:
      >>> def loss_fn(variables, batch, rngs):
      ...     w, ab = variables["frozen"]["kernel"], variables["lora"]
      ...     y = batch["x"] @ w + (batch["x"] @ ab["lora_a"]) @ ab["lora_b"]
      ...     return jnp.sum((y - batch["y"]) ** 2), jnp.float32(y.size), {}
      >>> lora = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> variables = {"frozen": {"kernel": jnp.ones((3, 2))}, "lora": lora}
      >>> tx = optax.adam(1e-2)
      >>> step = make_train_step(loss_fn, tx, accumulate=2)
      >>> state = TrainState.create(variables, tx, jax.random.key(0))
      >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 2))}
      >>> state, metrics = step(state, batch)
      >>> int(state.step), float(metrics["loss"])
      (1, 9.0)
    """
    check_accumulate(accumulate)

    def updated(own, frozen, batch, summed):
        trainable, opt_state = own["trainable"], own["opt_state"]

        def loss_of(trainable, batch, key):
            return loss_fn({**frozen, **trainable}, batch, {DROPOUT: key})

        key = jax.random.fold_in(own["rng"], own["step"])
        grads, sums = sum_gradients(loss_of, trainable, batch, key, accumulate, summed)
        weight = sums["weight"]

        def mean(x: jax.Array) -> jax.Array:
            return x / weight

        grads = jax.tree.map(mean, grads)
        loss, norm = mean(sums["loss"]), optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trainable)
        updates, new_opt_state = tx.update(grads, opt_state, trainable)
        new = (optax.apply_updates(trainable, updates), new_opt_state)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old).astype(old.dtype),
            new,
            (trainable, opt_state),
        )
        is_skipped = 1 - is_finite.astype(jnp.int32)
        metrics = {
            "loss": loss,
            "weight": weight,
            "grad_norm": norm,
            "is_skipped": is_skipped,
            **jax.tree.map(mean, sums["metrics"]),
        }
        return advanced(own, trainable, opt_state, is_skipped), metrics

    return TrainStep(updated)


def advanced(own: Any, trainable: Any, opt_state: Any, is_skipped: Any) -> Any:
    """Returns what a step changes of a state, after a step."""
    counts = {"step": own["step"] + 1, "skipped": own["skipped"] + is_skipped}
    return own | counts | {"trainable": trainable, "opt_state": opt_state}


def check_accumulate(accumulate: Any) -> None:
    """Raises unless ``accumulate`` is a number of microbatches."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int):
        raise TypeError(f"accumulate must be an integer; got {accumulate!r}.")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1; got {accumulate}.")


def sum_gradients(
    loss_fn: Callable[..., Any],
    trainable: PyTree,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    summed: PyTree | None,
) -> tuple[PyTree, dict[str, Any]]:
    """Returns the float32 gradients of a loss summed over microbatches, and the sums.

    ``loss_fn`` is ``(trainable, microbatch, key) -> (loss_sum, weight, metrics)``, its
    key that of the step with the microbatch's number folded in. ``summed`` are the
    shardings in which gradients are summed over the batch, or None.
    """

    def gradients(batch, index):
        own_key = jax.random.fold_in(key, index)

        def loss(trainable):
            loss_sum, weight, metrics = check_loss(loss_fn(trainable, batch, own_key))
            return loss_sum, {"weight": weight, "metrics": metrics}

        (loss_sum, sums), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if summed is not None:
            # Otherwise XLA gathers activations over fsdp to compute a sharded gradient,
            # which moves more data than an all-reduce of the thin gradient.
            grads = jax.lax.with_sharding_constraint(grads, summed)
        return grads, {"loss": loss_sum, **sums}

    if accumulate == 1:
        return gradients(batch, 0)

    def body(total, xs):
        grads, sums = gradients(*xs)
        return jax.tree.map(jnp.add, total, grads), sums

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    xs = split_batch(batch, accumulate), jnp.arange(accumulate)
    grads, sums = jax.lax.scan(body, zeros, xs)
    return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def make_eval_step(loss_fn: LossFn) -> Callable[[PyTree, Batch], Metrics]:
    """Builds the compiled evaluation step ``(variables, batch) -> sums``.

    Add up the sums of all batches, then divide by ``weight``.

    Args:
      loss_fn: as for `make_train_step`, but called with empty ``rngs``, meaning
        deterministic.

    Returns:
      A function of variables and batch that returns float32 sums: ``loss``, ``weight``
      and ``loss_fn``'s metrics.

    Example:
      >>> def loss_fn(variables, batch, rngs):
      ...     return jnp.sum(batch * variables["params"]), jnp.float32(len(batch)), {}
      >>> sums = make_eval_step(loss_fn)({"params": 2.0}, jnp.arange(3.0))
      >>> float(sums["loss"] / sums["weight"])
      2.0
    """

    @functools.partial(jax.jit, static_argnums=2)
    def evaluate(variables, batch, mesh):
        with on_mesh_of(mesh):
            loss_sum, weight, metrics = check_loss(loss_fn(variables, batch, {}))
        return {"loss": loss_sum, "weight": weight, **metrics}

    return lambda variables, batch: evaluate(variables, batch, mesh_of(variables))


def split_batch(batch: Batch, accumulate: int) -> Batch:
    """Splits every leaf ``[b, ...]`` into ``[accumulate, b / accumulate, ...]``.

    Rows are assigned round-robin, so a batch sharded by rows needs no resharding.

    Args:
      batch: leaves that share their first dimension.
      accumulate: number of microbatches.

    Returns:
      The tree with a leading microbatch axis.

    Raises:
      ValueError: listing the leaves, if one has no rows, they differ in rows, or the
        number of rows is not divisible by ``accumulate``.

    Example:
      >>> split_batch({"x": jnp.arange(4)}, 2)["x"].tolist()
      [[0, 2], [1, 3]]
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(batch).items()}
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(
            f"batch leaves must share their first dimension, the rows; got {shapes}."
        )
    (b,) = rows
    if b % accumulate:
        raise ValueError(
            f"the batch must divide into accumulate = {accumulate} microbatches; got "
            f"{b} rows. Take a batch size of {b - b % accumulate or accumulate} or "
            f"{b - b % accumulate + accumulate}."
        )
    return jax.tree.map(
        lambda x: x.reshape(b // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )


def check_loss(result: Any) -> tuple[jax.Array, jax.Array, Metrics]:
    """Returns a loss function's three results as float32 scalars, or raises.

    Raises:
      TypeError: if ``result`` is not such a triple, or metrics is not a mapping.
      ValueError: listing every value that is not a real scalar and every metric with a
        reserved name.
    """
    if not isinstance(result, tuple) or len(result) != 3:
        kind = type(result).__name__
        size = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise TypeError(
            "loss_fn must return a tuple of 3, (loss_sum, weight, metrics); got "
            f"{kind}{size}. Return `loss_sum, weight, {{}}` if there are no metrics."
        )
    loss_sum, weight, metrics = result
    if not isinstance(metrics, Mapping):
        raise TypeError(
            "loss_fn must return metrics as a mapping from names to sums; got "
            f"{type(metrics).__name__}."
        )
    named = {"loss_sum": loss_sum, "weight": weight, **metrics}
    faults = [f"{k} is reserved" for k in metrics if k in OWN_METRICS]
    for name, value in named.items():
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape or jnp.issubdtype(dtype, jnp.complexfloating):
            faults.append(f"{name} has shape {shape}, dtype {dtype}")
    if not jnp.issubdtype(jnp.result_type(loss_sum), jnp.floating):
        faults.append(f"loss_sum has dtype {jnp.result_type(loss_sum)}")
    if faults:
        raise ValueError(
            "loss_fn must return real scalars: sums over the batch, a floating "
            f"loss_sum first; got: {'; '.join(faults)}."
        )

    def as_float(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    metrics = {name: as_float(value) for name, value in metrics.items()}
    return as_float(loss_sum), as_float(weight), metrics
