"""Many runs in one compiled step: their states side by side over one frozen base.

The step is that of `make_train_step` under `jax.vmap`: over a run's trained leaves,
optimizer, key and batch, and over what its settings say (`Hyper`), but not over W0. So
the base's matmuls stay single ones, of the rows of all members, and W0 is read once.

Ranks are padded to the largest with zeros, which is exact: zero columns of A and rows
of B get zero gradients, and Adam leaves them at zero. A member's ``alpha / rank`` is
multiplied into its B inside the step, so the shared module's own scaling must be 1.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.array_types import PyTree
from lora_jax.names import (
    ADAPTER,
    FIXED,
    FROZEN,
    KEEP,
    LAYERS,
    LORA,
    LORA_B,
    START_B,
)
from lora_jax.train.optimizer import DECAYS, b_leaves, decay_mask, scheduled
from lora_jax.train.padding import padded
from lora_jax.train.step import LossFn, make_train_step
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


class Hyper(NamedTuple):
    """What is a member's own and doesn't change: what its settings say, as numbers.

    Attributes:
      learning_rate: peak of the schedule.
      schedule: its index in `DECAYS`.
      warmup_steps: steps of linear warmup.
      total_steps: steps of the run.
      weight_decay: decoupled.
      clip_norm: largest global norm; infinite for no clipping.
      lora_b_ratio: learning rate of B divided by that of A.
      scaling: ``alpha / rank`` by the path of each ``lora_b`` and ``start_b``.
      keep: 1 minus the dropout rate; None for that of the shared module.
      fixed: the adapter's leaves that aren't trained, if the method has some.
    """

    learning_rate: Any
    schedule: Any
    warmup_steps: Any
    total_steps: Any
    weight_decay: Any
    clip_norm: Any
    lora_b_ratio: Any
    scaling: Mapping[str, Any]
    keep: Any = None
    fixed: PyTree = None

    @classmethod
    def of(
        cls,
        targets: Sequence[Target],
        *,
        learning_rate: float,
        total_steps: int,
        warmup_steps: int = 0,
        schedule: str = "linear",
        clip_norm: float | None = 1.0,
        weight_decay: float = 0.0,
        lora_b_ratio: float = 1.0,
        dropout_rate: float | None = None,
    ) -> "Hyper":
        """Returns the numbers of `lora_optimizer`'s arguments, float32 and int32.

        ``targets`` are the member's adapted layers, and ``dropout_rate`` is its own, if
        members differ in it.
        """
        return cls(
            learning_rate=np.float32(learning_rate),
            schedule=np.int32([*DECAYS].index(schedule)),
            warmup_steps=np.int32(warmup_steps),
            total_steps=np.int32(total_steps),
            weight_decay=np.float32(weight_decay),
            clip_norm=np.float32(math.inf if clip_norm is None else clip_norm),
            lora_b_ratio=np.float32(lora_b_ratio),
            scaling={
                child(t.path, name): np.float32(t.scaling)
                for t in targets
                for name, _ in t.leaves
                if name in (LORA_B, START_B)
            },
            keep=None if dropout_rate is None else np.float32(1.0 - dropout_rate),
        )


def member_optimizer(hyper: Hyper) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `lora_optimizer`, for numbers that are traced.

    Its state has the leaves of `lora_optimizer`'s, in the same order.

    Args:
      hyper: of one member.

    Returns:
      The transform.
    """

    def rate(step: Any) -> Any:
        numbers = (hyper.learning_rate, hyper.warmup_steps, hyper.total_steps)
        return scheduled(step, *numbers, decay)

    def decay(x: Any) -> Any:
        decays = [jnp.asarray(decay(x), x.dtype) for decay in DECAYS.values()]
        return jnp.stack(decays)[hyper.schedule]

    return optax.chain(
        optax.clip_by_global_norm(hyper.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.masked(optax.scale(hyper.lora_b_ratio), b_leaves),
        optax.scale_by_learning_rate(rate),
    )


def shared_adapter(
    variables: Mapping[str, PyTree], hyper: Hyper, targets: Sequence[Target]
) -> dict[str, PyTree]:
    """Returns a member's adapter as the shared module takes it.

    Args:
      variables: the member's collections; only ``lora`` and ``fixed`` are read.
      hyper: of the member.
      targets: of the shared module.

    Returns:
      Those collections with the shared module's ranks, and the member's scaling
      multiplied into B.
    """
    shapes = {
        child(target.path, name): shape
        for target in targets
        for name, shape in target.leaf_shapes.items()
    }
    return {
        held: unflatten(
            {
                path: padded(
                    hyper.scaling.get(path, 1) * np.asarray(leaf), shapes[path]
                )
                for path, leaf in flatten(variables[held]).items()
            }
        )
        for held in ADAPTER
        if held in variables
    }


def members_update(loss_fn: LossFn, accumulate: int, count: int) -> Any:
    """Returns the pure step of many members; see `Members`.

    Args:
      loss_fn: of the shared module.
      accumulate: see `make_train_step`.
      count: how many members.

    Returns:
      A function of ``own, hyper, is_active, frozen, batch``, of which all but the
      frozen base have a leading axis of ``count``.
    """

    def step(own, hyper, is_active, frozen, batch):
        def scaled_loss(variables, batch, rngs):
            own = _scaled(variables, hyper)
            if hyper.keep is not None:
                own[FROZEN] = unflatten(flatten(own[FROZEN]) | _keeps(hyper, own))
            return loss_fn(own, batch, rngs)

        one = make_train_step(scaled_loss, member_optimizer(hyper), accumulate)
        new, metrics = one.function(own, frozen, batch)
        rng, no_key = own["rng"], {"rng": ()}
        kept = jax.tree.map(
            lambda x, y: jnp.where(is_active, x, y), new | no_key, own | no_key
        )
        return {**kept, "rng": rng}, metrics

    every = jax.vmap(step, in_axes=(0, 0, 0, None, 0))

    def update(own, hyper, is_active, frozen, batch):
        own, metrics = every(own, hyper, is_active, frozen, batch)
        each = jax.tree.map(list, metrics)
        return own, [{k: x[i] for k, x in each.items()} for i in range(count)]

    return update


def _scaled(variables: Mapping[str, PyTree], hyper: Hyper) -> dict[str, PyTree]:
    """Returns padded collections of a member as the shared module takes them."""
    own = {LORA: variables[LORA]}
    if hyper.fixed is not None:
        own[FIXED] = hyper.fixed
    scaling = hyper.scaling
    return dict(variables) | {
        held: unflatten({p: scaling.get(p, 1) * x for p, x in flatten(tree).items()})
        for held, tree in own.items()
    }


def members_evaluation(step: Callable[[PyTree, PyTree], PyTree]) -> Any:
    """Returns the evaluation of many members on one batch; see `Members.evaluate`.

    Args:
      step: of the shared module, such as from `make_eval_step`.

    Returns:
      A jitted function of ``trainable, hyper, frozen, batch``, of which the first two
      have a leading axis, to the results of ``step`` with that axis.
    """

    def one(trainable, hyper, frozen, batch):
        return step(_scaled({**frozen, **trainable}, hyper), batch)

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, None)))


def _keeps(hyper: Hyper, variables: Mapping[str, PyTree]) -> dict[str, Any]:
    """Returns the probability that `apply_adapter` finds beside each layer's A."""
    held = (flatten(variables.get(name, {})) for name in ADAPTER)
    return {
        path.removesuffix(LORA_B) + KEEP: jnp.broadcast_to(
            hyper.keep, leaf.shape[:1] if LAYERS in path.split("/") else ()
        )
        for path, leaf in itertools.chain(*(leaves.items() for leaves in held))
        if path.endswith(LORA_B)
    }
