"""Training several adapters at once, on batches that mix their examples.

Each row of a batch has the number of its adapter, under `OWNER`. The gradient of an
adapter is that of its own rows alone, divided by their weight: what a run of its own
would compute from these rows. Clipping, Adam and weight decay are each adapter's own.

Only the adapters of a batch are gathered from the state, updated and put back. One
without rows in it keeps its bits: neither its moments nor its weights decay, and its
step count, which drives the learning rate and Adam's bias correction, stands still. So
a step's arithmetic grows with the batch, not with the number of adapters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.names import BATCH_AXES, DROPOUT, OWNER, TRAINABLE
from lora_jax.parallel.activation_sharding import (
    num_row_shards,
    on_mesh_of,
    shard_rows,
)
from lora_jax.parallel.mesh import mesh_of, on_mesh, whole_over_batch
from lora_jax.train.members import Hyper, member_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import (
    Batch,
    LossFn,
    TrainStep,
    advanced,
    check_accumulate,
    check_loss,
    sum_gradients,
)
from lora_jax.tree.paths import key_path, leaves_by_path

WEIGHTS = "weights"  # of a batch: of a row, or of its tokens


def mixed_state(
    variables: Mapping[str, PyTree], hypers: Hyper, rng: PRNGKey
) -> TrainState:
    """Returns the state of adapters that all start alike.

    Args:
      variables: of one adapter, as for `TrainState.create`.
      hypers: the numbers of ``k`` adapters; leaves ``[k]``.
      rng: a PRNG key.

    Returns:
      A state whose trainable leaves and optimizer state have a leading axis of ``k``.
    """
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    frozen = {name: variables[name] for name in variables if name not in trainable}
    count, mesh = len(hypers.total_steps), mesh_of(variables)

    def make(trainable: PyTree, rng: PRNGKey) -> TrainState:
        stacked = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), trainable
        )
        tx = optax.GradientTransformation(init, optax.identity().update)
        return TrainState.create(stacked, tx, rng)

    def init(params: PyTree) -> PyTree:
        return jax.vmap(lambda own, part: member_optimizer(own).init(part))(
            hypers, params
        )

    if mesh is None:
        state = make(trainable, rng)
        return dataclasses.replace(state, frozen=jax.tree.map(jnp.asarray, frozen))
    places = mixed_places(jax.eval_shape(make, trainable, rng), trainable, mesh)
    state = jax.jit(make, out_shardings=places)(trainable, rng)
    return dataclasses.replace(state, frozen=on_mesh(frozen, mesh))


def mixed_places(
    shapes: TrainState, trainable: Mapping[str, PyTree], mesh: Mesh
) -> TrainState:
    """Returns the shardings of a state of several adapters.

    Args:
      shapes: of the state.
      trainable: of one adapter, sharded over the mesh.
      mesh: the mesh.

    Returns:
      Of a trained leaf, and of what the optimizer keeps for it, the sharding of the
      leaf of one adapter, not split over adapters; all else is replicated.
    """
    alone = {
        path: NamedSharding(mesh, PartitionSpec(None, *leaf.sharding.spec))
        for path, leaf in leaves_by_path(trainable).items()
        if isinstance(leaf.sharding, NamedSharding)
    }
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> NamedSharding:
        del leaf
        name = f"/{key_path(path)}"
        own = (place for end, place in alone.items() if name.endswith(f"/{end}"))
        return next(own, everywhere)

    return jax.tree_util.tree_map_with_path(place, shapes)


def make_mixed_step(loss_fn: LossFn, hypers: Hyper, accumulate: int = 1) -> TrainStep:
    """Builds the step ``(state, batch) -> (state, metrics)`` of several adapters.

    With ``L_j`` and ``w_j`` the summed loss and weight of adapter ``j``'s rows, its
    gradient is ``∂L_j / ∂p_j / w_j``.

    Args:
      loss_fn: as for `make_train_step`, of a model whose trainable leaves have a
        leading axis of rows (`lora_jax.nn.rows.RowAdapted`). Its batch has
        ``weights``, of rows or of their tokens.
      hypers: the optimizers' numbers; leaves ``[k]``.
      accumulate: number of microbatches; see `make_train_step`.

    Returns:
      The step, for states of `mixed_state` and batches with the row's adapter under
      ``"adapter"`` ``[b]``, numbers below ``k``. Its metrics: ``loss`` and ``weight``
      of the whole batch; ``grad_norm``, the mean of its adapters'; ``is_skipped``,
      whether one of them had a gradient that was not finite and was left as it was.
    """
    check_accumulate(accumulate)
    count = len(hypers.total_steps)

    def stepped(hyper, grads, opt_state, trainable):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trainable)
        tx = member_optimizer(hyper)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    def updated(own, frozen, batch, summed):
        batch = dict(batch)
        ids = batch.pop(OWNER)
        slots, place = jnp.unique(
            ids, return_inverse=True, size=min(len(ids), count), fill_value=count
        )
        whole = (own["trainable"], own["opt_state"])
        chosen, hyper = jax.tree.map(
            lambda leaf: jnp.asarray(leaf).at[slots].get(mode="clip"), (whole, hypers)
        )
        trainable, opt_state = chosen

        def loss(trainable, rows, key):
            part, places = rows
            of_rows = _of_rows(trainable, places, summed)
            return loss_fn({**frozen, **of_rows}, part, {DROPOUT: key})

        rows, key = (batch, place), jax.random.fold_in(own["rng"], own["step"])
        grads, sums = sum_gradients(loss, trainable, rows, key, accumulate, summed)
        weight = jax.ops.segment_sum(_row_weights(batch), place, len(slots))
        has_rows = weight > 0
        safe = jnp.where(has_rows, weight, 1)
        grads = jax.tree.map(lambda g: g / _wide(safe, g), grads)
        norm = jax.vmap(optax.tree.norm)(grads)
        is_finite = jnp.isfinite(norm)
        new = jax.vmap(stepped)(hyper, grads, opt_state, trainable)
        is_kept = has_rows & is_finite
        new = jax.tree.map(
            lambda x, y: jnp.where(_wide(is_kept, x), x, y).astype(y.dtype), new, chosen
        )
        trainable, opt_state = jax.tree.map(
            lambda x, y: x.at[slots].set(y, mode="drop"), whole, new
        )
        is_skipped = jnp.any(has_rows & ~is_finite).astype(jnp.int32)
        total = sums["weight"]
        metrics = {
            "loss": sums["loss"] / total,
            "weight": total,
            "grad_norm": jnp.sum(jnp.where(has_rows, norm, 0)) / jnp.sum(has_rows),
            "is_skipped": is_skipped,
            **{name: value / total for name, value in sums["metrics"].items()},
        }
        return advanced(own, trainable, opt_state, is_skipped), metrics

    return TrainStep(updated)


def make_mixed_eval_step(loss_fn: LossFn) -> Callable[..., dict[str, jax.Array]]:
    """Builds the evaluation ``(trainable, frozen, batch) -> sums`` of each row.

    Args:
      loss_fn: as for `make_eval_step`, of the model with one adapter.

    Returns:
      A jitted function of stacked trainable collections, the other collections and a
      batch with ``"adapter"``; it returns ``loss``, ``weight`` and the metrics of every
      row ``[b]``.
    """

    @functools.partial(jax.jit, static_argnums=3)
    def evaluate(trainable, frozen, batch, mesh):
        batch = dict(batch)
        ids = batch.pop(OWNER)

        def one(own: PyTree, row: Batch) -> dict[str, jax.Array]:
            alone = jax.tree.map(lambda leaf: leaf[None], row)
            result = loss_fn({**frozen, **own}, alone, {})
            loss_sum, weight, metrics = check_loss(result)
            return {"loss": loss_sum, "weight": weight, **metrics}

        with on_mesh_of(mesh):
            rows = jax.tree.map(lambda leaf: _split_rows(leaf[ids]), trainable)
            return jax.vmap(one)(rows, batch)

    return lambda trainable, frozen, batch: evaluate(
        trainable, frozen, batch, mesh_of(frozen)
    )


def evaluate_each(
    step: Callable[..., Mapping[str, jax.Array]],
    trainable: PyTree,
    frozen: PyTree,
    batches: Iterable[Batch],
    count: int,
) -> dict[str, np.ndarray]:
    """Averages an evaluation over batches, for each adapter.

    Args:
      step: from `make_mixed_eval_step`.
      trainable: of all adapters; leaves ``[k, ...]``.
      frozen: the other collections.
      batches: with the rows' adapters.
      count: ``k``.

    Returns:
      The means ``[k]`` of ``loss`` and of each other metric, NaN for an adapter without
      rows, and the total ``weight`` of each.
    """
    total: dict[str, np.ndarray] = {}
    pending = [(batch[OWNER], step(trainable, frozen, batch)) for batch in batches]
    for ids, sums in jax.device_get(pending):
        for name, values in sums.items():
            own = total.setdefault(name, np.zeros(count))
            np.add.at(own, ids, values.astype(np.float64))
    weight = total.pop("weight")
    divisor = np.where(weight > 0, weight, np.nan)
    return {**{k: v / divisor for k, v in total.items()}, "weight": weight}


def _of_rows(chosen: PyTree, place: Int[Array, " b"], summed: PyTree | None) -> PyTree:
    """Returns each row's adapter; on a mesh that which its device has the row of."""
    if summed is None:
        return jax.tree.map(lambda leaf: leaf[place], chosen)

    def split(leaf: Array, whole: NamedSharding) -> Array:
        # Gathered as few adapters, not as many rows.
        whole = whole_over_batch(whole)
        leaf = jax.lax.with_sharding_constraint(leaf, whole)[place]
        spec = PartitionSpec(BATCH_AXES, *whole.spec[1:])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(whole.mesh, spec))

    return jax.tree.map(split, chosen, summed)


def _split_rows(rows: Array) -> Array:
    """Splits the rows' adapters over a mesh, if there is one."""
    if num_row_shards() > 1:
        rows = jax.lax.with_sharding_constraint(rows, PartitionSpec())
    return shard_rows(rows)


def _row_weights(batch: Mapping[str, Array]) -> Float[Array, " b"]:
    weights = batch[WEIGHTS]
    return jnp.sum(weights, axis=tuple(range(1, weights.ndim)))


def _wide(per_adapter: Float[Array, " u"] | Int[Array, " u"], like: Array) -> Array:
    """Gives one number for each adapter the axes of its leaf."""
    return per_adapter.reshape(-1, *[1] * (like.ndim - 1))
