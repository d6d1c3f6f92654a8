"""`Members`: slots of runs that share a compiled step of `lora_jax.train.members`."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.names import FIXED, MEMBER
from lora_jax.train.members import Hyper, members_update
from lora_jax.train.padding import cut, padded_as
from lora_jax.train.state import TrainState
from lora_jax.train.step import Batch, LossFn, Metrics


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
        leaves = [cut(x, y) for x, y in zip(own, leaves, strict=True)]
        return TrainState(frozen=like.frozen, **jax.tree.unflatten(structure, leaves))

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

    def evaluate(self, evaluation: Any, batches: Iterable[Batch]) -> list[Any]:
        """Evaluates all runs on the same batches, in one program.

        Args:
          evaluation: from `members_evaluation`.
          batches: the batches.

        Returns:
          What it gives for each batch, on the host.
        """
        own = (self.state.trainable, self.hyper, self.state.frozen)
        return jax.device_get([evaluation(*own, batch) for batch in batches])

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


def _stack(tree: PyTree, *, count: int, sharding: Any) -> PyTree:
    def stack(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            where = leaf.sharding if sharding is None else sharding
            shape = (count, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)
        stacked = jnp.stack([jnp.asarray(leaf)] * count)
        return stacked if sharding is None else jax.device_put(stacked, sharding)

    return jax.tree.map(stack, tree)
