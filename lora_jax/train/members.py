"""Many runs in one compiled step: their states side by side over one frozen base.

The step is that of `make_train_step` under `jax.vmap`: over a run's trained leaves,
optimizer, key and batch, and over what its settings say (`Hyper`), but not over W0. So
the base's matmuls stay single ones, of the rows of all members, and W0 is read once.

Ranks are padded to the largest with zeros, which is exact: zero columns of A and rows
of B get zero gradients, and Adam leaves them at zero. A member's ``alpha / rank`` is
multiplied into its B inside the step, so the shared module's own scaling must be 1.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.names import (
    ADAPTER,
    FIXED,
    FROZEN,
    KEEP,
    LAYERS,
    LORA,
    LORA_B,
    MEMBER,
    START_B,
)
from lora_jax.train.optimizer import DECAYS, decay_mask
from lora_jax.train.padding import cut, padded, padded_as
from lora_jax.train.state import TrainState
from lora_jax.train.step import Batch, LossFn, Metrics, make_train_step
from lora_jax.tree.paths import flatten, key_path, unflatten
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
        """Returns the numbers for `lora_optimizer`'s arguments.

        Args:
          targets: the member's adapted layers.
          learning_rate: this and the others are those of `lora_optimizer`.
          total_steps: see there.
          warmup_steps: see there.
          schedule: see there.
          clip_norm: see there.
          weight_decay: see there.
          lora_b_ratio: see there.
          dropout_rate: the member's own, if members differ in it.

        Returns:
          The numbers, float32 and int32.
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
        warmup_steps = hyper.warmup_steps
        warmup = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup_steps, 1))
        decay_steps = jnp.maximum(hyper.total_steps - warmup_steps, 1)
        x = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        decays = jnp.stack(
            [jnp.asarray(decay(x), x.dtype) for decay in DECAYS.values()]
        )
        return hyper.learning_rate * warmup * decays[hyper.schedule]

    return optax.chain(
        optax.clip_by_global_norm(hyper.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.masked(optax.scale(hyper.lora_b_ratio), _b_mask),
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


class Members:
    """The states of ``m`` runs, and the compiled step that they share.

    A slot holds one run at a time; another takes its place without a compilation.

    Attributes:
      state: the states, each leaf with a leading axis of ``m``; the base without.
      hyper: the numbers of the members, likewise.
      update: the jitted step, ``(own, hyper, is_active, frozen, batch)`` to the new
        ``own`` and a list of the members' metrics; compiles once a shape of batch.

    Args:
      loss_fn: of the shared module, whose scaling is 1, at the largest ranks.
      accumulate: see `make_train_step`.
      state: a state with the shared module's shapes and `member_optimizer`'s state;
        shapes with shardings are enough to `trace`.
      hyper: of any member.
      count: ``m``.
      mesh: whose axis ``member`` the members are split over, or None.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        accumulate: int,
        state: TrainState,
        hyper: Hyper,
        count: int,
        mesh: Mesh | None = None,
    ) -> None:
        self._split = self._whole = None
        if mesh is not None:
            self._split = NamedSharding(mesh, PartitionSpec(MEMBER))
            self._whole = NamedSharding(mesh, PartitionSpec())
        stack = functools.partial(_stack, count=count, sharding=self._split)
        frozen = {name: x for name, x in state.frozen.items() if name != FIXED}
        if self._whole is not None:
            frozen = jax.device_put(frozen, self._whole)
        self._template, self._count = (state.changing, hyper), count
        self.state = TrainState(frozen=frozen, **stack(state.changing))
        self.hyper = stack(hyper)
        update = members_update(loss_fn, accumulate, count)
        wanted = self._split and (self._split, self._whole)
        self.update: Any = jax.jit(update, donate_argnums=0, out_shardings=wanted)
        self._set: Any = jax.jit(
            lambda tree, new, i: jax.tree.map(lambda x, y: x.at[i].set(y), tree, new),
            donate_argnums=0,
            out_shardings=self._split,
        )
        self._get: Any = jax.jit(lambda tree, i: jax.tree.map(lambda x: x[i], tree))

    def put(self, slot: int, state: TrainState, hyper: Hyper) -> None:
        """Puts a run into a slot.

        Args:
          slot: below ``m``.
          state: its own, with its own ranks and the state of `lora_optimizer`.
          hyper: its numbers.
        """
        template, like = self._template
        own = self._set(self.state.changing, padded_as(template, state.changing), slot)
        self.state = TrainState(frozen=self.state.frozen, **own)
        self.hyper = self._set(self.hyper, padded_as(like, hyper), slot)

    def get(self, slot: int, like: TrainState) -> TrainState:
        """Returns the state of the run in a slot.

        Args:
          slot: below ``m``.
          like: a state of that run: gives structure, ranks and the frozen base.

        Returns:
          The state, with the run's own ranks, on the devices of ``like``.
        """
        own = jax.tree.leaves(self._get(self.state.changing, slot))
        leaves, structure = jax.tree.flatten(like.changing)
        cut = [cut(x, y) for x, y in zip(own, leaves, strict=True)]
        return TrainState(frozen=like.frozen, **jax.tree.unflatten(structure, cut))

    def step(self, batches: Mapping[int, Batch]) -> dict[int, Metrics]:
        """Takes one step of some of the runs; the others stay as they are.

        Args:
          batches: the batch of each run that takes a step, by slot; all of one shape.

        Returns:
          The metrics of each of them.
        """
        filler = next(iter(batches.values()))
        rows = [batches.get(slot, filler) for slot in range(self._count)]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        is_active = np.array([slot in batches for slot in range(self._count)])
        if self._split is not None:
            batch, is_active = jax.device_put((batch, is_active), self._split)
        own, metrics = self.update(
            self.state.changing, self.hyper, is_active, self.state.frozen, batch
        )
        self.state = TrainState(frozen=self.state.frozen, **own)
        return {slot: metrics[slot] for slot in batches}

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Traces the step; see `TrainStep.trace`.

        Args:
          state: states or their shapes, as `state`.
          batch: shapes ``[m, b, ...]``.

        Returns:
          A ``jax.stages.Traced``.
        """
        is_active = jax.ShapeDtypeStruct((self._count,), bool, sharding=self._split)
        return self.update.trace(
            state.changing, self.hyper, is_active, state.frozen, batch
        )

    def shapes(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the batches of all members, given those of one."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            lead = (self._count, *leaf.shape)
            return jax.ShapeDtypeStruct(lead, leaf.dtype, sharding=self._split)

        return {name: shape(leaf) for name, leaf in batch.items()}


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
        def scaled(leaves):
            scaling = hyper.scaling
            return unflatten({p: scaling.get(p, 1) * x for p, x in leaves.items()})

        def scaled_loss(variables, batch, rngs):
            own = {**variables, LORA: scaled(flatten(variables[LORA]))}
            if hyper.fixed is not None:
                own[FIXED] = scaled(flatten(hyper.fixed))
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


def _b_mask(tree: PyTree) -> PyTree:
    """Returns `lora_b_mask`, but of trees without B (VeRA) too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: LORA_B in key_path(path).split("/"), tree
    )


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


def _stack(tree: PyTree, *, count: int, sharding: Any) -> PyTree:
    def stack(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            where = leaf.sharding if sharding is None else sharding
            shape = (count, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)
        stacked = jnp.stack([jnp.asarray(leaf)] * count)
        return stacked if sharding is None else jax.device_put(stacked, sharding)

    return jax.tree.map(stack, tree)
