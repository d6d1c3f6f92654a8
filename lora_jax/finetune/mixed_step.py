"""The optimizers and state of a run whose examples name their adapter."""

from typing import Any

import jax
import numpy as np

from lora_jax.finetune import job as jobs
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import listed
from lora_jax.names import EMBED, HEAD, PARAMS
from lora_jax.parallel.mesh import mesh_of
from lora_jax.train.buckets import Schedule
from lora_jax.train.members import Hyper
from lora_jax.train.mixed import mixed_places, mixed_state
from lora_jax.train.state import TrainState


def mixed_hypers(job: jobs.Job, batches: Schedule, total: int) -> Hyper:
    """Returns the optimizers' numbers of all adapters.

    An adapter's schedule spans the steps in which it has examples, as in a run of its
    own.

    Args:
      job: the job, with ``adapters``.
      batches: of its training split.
      total: steps of the run.

    Returns:
      Leaves ``[k]``.

    Raises:
      UserError: if an adapter has examples in no step; or the settings need one model
        for all adapters.
    """
    train = job.settings.train
    if train.samples:
        raise UserError(
            f"train.samples must be empty for {len(job.adapters)} adapters: it doesn't "
            "say whose continuations it wants."
        )
    if job.lora.fixes_leaves:
        own = job.lora
        is_set = {"vera": own.vera, "lora_fa": own.lora_fa}
        named = next((k for k in is_set if is_set[k]), f"init = {own.init!r}")
        raise UserError(
            f"lora.{named} is for a run with one adapter, whose start "
            f"the run folder keeps; the examples name {len(job.adapters)}."
        )
    if train.router_aux_loss_coef:
        raise UserError(
            "train.router_aux_loss_coef must be 0 where examples name their adapter: "
            "the balance of experts is one of whole batches."
        )
    if shared := {EMBED, HEAD} & {*job.variables.get(PARAMS, {})}:
        raise UserError(
            f"lora.train and lora.tokens can't name a decoder's "
            f"{' and '.join(sorted(shared))} where examples name their adapter: every "
            "adapter would have one of its own."
        )
    steps = np.zeros(len(job.adapters), np.int64)
    for number in range(total):
        steps[batches.adapters_at(number)] += 1
    if unused := [name for name, n in zip(job.adapters, steps, strict=True) if not n]:
        raise UserError(
            f"{len(unused)} of {len(job.adapters)} adapters have no example in the "
            f"{total} steps of the run: {listed(unused)}. Raise train.max_steps or "
            "train.batch_size."
        )
    one = Hyper.of([], **jobs.optimizer_options(train, total))
    every: Any = jax.tree.map(lambda x: np.full(len(steps), x), one)
    return every._replace(
        total_steps=steps.astype(np.int32),
        warmup_steps=np.round(train.warmup * steps).astype(np.int32),
    )


def mixed_shapes(job: jobs.Job, hypers: Hyper) -> TrainState:
    """Returns the initial state as shapes, of which thousands may not fit.

    Args:
      job: the job.
      hypers: from `mixed_hypers`.

    Returns:
      The frozen base, and shapes with shardings.
    """
    key = jax.random.key(job.settings.train.seed)
    state = jax.eval_shape(
        lambda variables, key: mixed_state(variables, hypers, key), job.variables, key
    )
    trainable = {k: tree for k, tree in job.variables.items() if k in state.trainable}
    if (mesh := mesh_of(job.variables)) is None:
        here = jax.tree.leaves(job.variables)[0].sharding
        places = jax.tree.map(lambda leaf: here, state)
    else:
        places = mixed_places(state, trainable, mesh)

    def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    frozen = {k: tree for k, tree in job.variables.items() if k not in trainable}
    return jax.tree.map(placed, state, places).replace(frozen=frozen)
