"""Several adapters on one base: each row of a batch has its own.

``y[b] = x[b] W0 + s (x[b] A[id[b]]) B[id[b]]``: the adapters of all rows are gathered,
and the model is mapped over rows and adapters together (`jax.vmap`). W0 is not mapped,
so its product stays one matmul for the whole batch. Every adapter is padded to the
bank's ranks, with its scaling in B: a change of adapters compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA, LORA_A, LORA_B, MAGNITUDE, TRAINABLE
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.tree.arithmetic import fit_adapter
from lora_jax.tree.paths import flatten, nearest, unflatten
from lora_jax.tree.targets import Target, child

Member = tuple[Mapping[str, Any], Sequence[Target]]  # an adapter tree and its targets


@dataclasses.dataclass(frozen=True)
class RowAdapted:
    """An adapted model whose trained leaves have a leading axis: the batch's rows.

    Attributes:
      adapted: the model, for one adapter.
    """

    adapted: Adapted

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.adapted.model

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        method: Any = None,
        rngs: Mapping[str, jax.Array] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the model, each row with its own adapter.

        Args:
          variables: ``{"frozen": base, "lora": leaves [b, ...]}``, and ``params``
            likewise if weights are trained in full.
          *args: as for the model; the first axis of every array is the rows.
          method: of the model.
          rngs: keys; each row has its own from them.
          **kwargs: as ``args``.

        Returns:
          What the model returns; its arrays have the rows as their first axis.
        """
        leaves, treedef = jax.tree.flatten((args, kwargs))
        mapped = [place for place, leaf in enumerate(leaves) if jnp.ndim(leaf)]
        own = {name: variables[name] for name in TRAINABLE if name in variables}
        shared = {name: tree for name, tree in variables.items() if name not in own}
        count = len(jax.tree.leaves(own)[0])
        keys = {
            name: jax.random.split(key, count) for name, key in (rngs or {}).items()
        }

        def of_row(own: PyTree, keys: PyTree, *rows: jax.Array) -> Any:
            filled = list(leaves)
            for place, row in zip(mapped, rows, strict=True):
                filled[place] = row[None]
            args, kwargs = jax.tree.unflatten(treedef, filled)
            whole = {**shared, **own}
            found = self.adapted.apply(whole, *args, method=method, rngs=keys, **kwargs)
            return jax.tree.map(lambda y: y[0], found)

        return jax.vmap(of_row)(own, keys, *(leaves[place] for place in mapped))


class AdapterBank:
    """Adapters of one base by name, in arrays that one compiled function serves.

    Args:
      model: the base, a Linen module.
      params: its parameters.
      members: adapters by name, each a tree and its targets.
      *example_args: example inputs, as for `adapt`.
      capacity: the largest number of adapters; None for as many as ``members``.
      ranks: the largest rank to allow, by path, where those of ``members`` are smaller.

    Attributes:
      module: applies the adapters; ``module.apply(bank.variables(names), inputs)``.
      names: names of the adapters.

    Raises:
      ValueError: if there is no member, more of them than ``capacity``, some are DoRA
        and some are not, or one doesn't fit the base; see `add`.

    Example:
      >>> model, x = nn.Dense(2, name="up"), jnp.ones((2, 3))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> one = adapt(model, LoRAConfig(rank=1, alpha=1, targets=".*"), x)
      >>> lora = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}
      >>> bank = AdapterBank(model, params, {"a": (lora, one.targets(params))}, x)
      >>> bank.module.apply(bank.variables(["a", None]), x).tolist()
      [[6.0, 6.0], [3.0, 3.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        members: Mapping[str, Member],
        *example_args: Any,
        capacity: int | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        size = len(members) if capacity is None else capacity
        if not 0 < len(members) <= size:
            raise ValueError(
                f"a bank must have from 1 to capacity = {size} members; got "
                f"{len(members)}."
            )
        rows = [row for _, targets in members.values() for row in targets]
        kinds = {row.dora for row in rows}
        if len(kinds) > 1:
            named = [n for n, (_, rows) in members.items() if any(r.dora for r in rows)]
            raise ValueError(
                f"adapters of a bank must all be DoRA or none; {named} are. "
                "`combine_adapters` with method 'svd' makes LoRA of them."
            )
        largest = dict(ranks or {})
        for row in rows:
            largest[row.path] = max(row.rank, largest.get(row.path, 0))
        alphas = {path: float(rank) for path, rank in largest.items()}  # scaling 1
        config = LoRAConfig.for_layers(largest, alphas, dora=True in kinds)
        adapted = adapt(model, config, *example_args, deterministic=True)
        self.params, self.module = params, RowAdapted(adapted)
        self._targets = adapted.targets(params)
        self._none = self._neutral()
        self._lora = jax.tree.map(
            lambda leaf: jnp.repeat(leaf[None], size + 1, axis=0), self._none
        )
        self._slots: dict[str, int] = {}
        for name, (lora, targets) in members.items():
            self.add(name, lora, targets)

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order of their addition."""
        return list(self._slots)

    @property
    def capacity(self) -> int:
        """The largest number of adapters."""
        return len(jax.tree.leaves(self._lora)[0]) - 1

    def add(
        self, name: str, lora: Mapping[str, Any], targets: Sequence[Target]
    ) -> None:
        """Adds an adapter, or replaces the one of that name, without recompiling.

        Args:
          name: its name.
          lora: the adapter tree.
          targets: its targets.

        Raises:
          ValueError: if the bank is full, or the adapter has layers that the bank
            lacks, larger ranks, or another ``dora``; see `fit_adapter`.
        """
        slot = self._slots.get(name)
        if slot is None:
            free = set(range(1, self.capacity + 1)) - set(self._slots.values())
            if not free:
                raise ValueError(
                    f"the bank is full: capacity = {self.capacity}, and it holds "
                    f"{', '.join(self._slots)}. Remove one, or make a larger bank."
                )
            slot = min(free)
        try:
            fitted = fit_adapter(lora, targets, self._targets)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        self._lora = _placed(self._lora, slot, fitted)
        self._slots[name] = slot

    def remove(self, name: str) -> None:
        """Removes an adapter.

        Args:
          name: its name.

        Raises:
          ValueError: if there is no such adapter.
        """
        [slot] = self.slots([name])
        self._lora = _placed(self._lora, int(slot), self._none)
        del self._slots[name]

    def slots(self, names: Sequence[str | None]) -> jax.Array:
        """Returns the place ``[b]`` of each row's adapter, 0 for None.

        Args:
          names: one for each row.

        Returns:
          int32 indices into the bank's leaves.

        Raises:
          ValueError: listing the names that the bank doesn't have.
        """
        known = {None: 0, **self._slots}
        if unknown := dict.fromkeys(name for name in names if name not in known):
            hints = [
                f"{name!r} (did you mean {nearest(str(name), self.names)!r}?)"
                for name in unknown
            ]
            raise ValueError(f"the bank has no adapter {', '.join(hints)}.")
        return jnp.array([known[name] for name in names], jnp.int32)

    def variables(self, names: Sequence[str | None]) -> dict[str, PyTree]:
        """Returns the variables for a batch.

        Args:
          names: each row's adapter, None for the base alone.

        Returns:
          ``{"frozen": base, "lora": leaves [b, ...]}``, for `RowAdapted.apply`.
        """
        rows = _gathered(self._lora, self.slots(names))
        return {FROZEN: self.params, LORA: rows}

    def adapter(self, name: str | None) -> dict[str, PyTree]:
        """Returns the variables of one adapter, for ``bank.module.adapted.apply``.

        Args:
          name: of the adapter, None for the base alone.

        Returns:
          ``{"frozen": base, "lora": adapter}``.
        """
        [slot] = self.slots([name])
        return {FROZEN: self.params, LORA: _gathered(self._lora, slot)}

    def _neutral(self) -> PyTree:
        """Returns the adapter that changes nothing."""
        flat, leaves = flatten(self.params), {}
        for row in self._targets:
            for leaf, shape in zip((LORA_A, LORA_B), row.factor_shapes, strict=True):
                leaves[child(row.path, leaf)] = jnp.zeros(shape)
            if row.dora:
                m = row.init_magnitude(flat[row.weight_path])
                leaves[child(row.path, MAGNITUDE)] = m
        return unflatten(leaves)


@functools.partial(jax.jit, donate_argnums=0)
def _placed(lora: PyTree, slot: int, one: PyTree) -> PyTree:
    return jax.tree.map(lambda all_, new: all_.at[slot].set(new), lora, one)


@jax.jit
def _gathered(lora: PyTree, slots: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[slots], lora)
