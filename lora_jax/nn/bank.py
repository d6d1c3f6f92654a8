"""Several adapters on one base: each row of a batch has its own.

``y[b] = x[b] W0 + s (x[b] A[id[b]]) B[id[b]]``. The model is mapped over rows, see
`RowAdapted`. Adapters are padded to the rank of their class, with their scaling in B: a
change of adapters compiles nothing. Weights that adapters train in full, such as a
head, are an array for each adapter, of which every row takes its own.
"""

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA, PARAMS
from lora_jax.nn.adapt import adapt
from lora_jax.nn.bank_arrays import (
    Trained,
    classes,
    gathered,
    is_within,
    neutral,
    placed,
    with_magnitudes,
)
from lora_jax.nn.rows import SLOTS, RowAdapted
from lora_jax.ops.banked import AUTO, WAYS, Way, best_way
from lora_jax.tree.arithmetic import fit_adapter
from lora_jax.tree.paths import nearest
from lora_jax.tree.targets import Target

# An adapter tree, its targets and, if it trains weights in full, the tree of these.
Member = tuple[Any, ...]
Names = Sequence[str | None] | Sequence[Sequence[str | None]]  # of rows, or of tokens
ROUNDS = 5


class AdapterBank:
    """Adapters of one base by name, in arrays that one compiled function serves.

    Args:
      model: the base, a Linen module.
      params: its parameters.
      members: adapters by name, each a tree and its targets; with the tree of the
        weights that it trains in full (``variables["params"]``), if it does.
      *example_args: example inputs, as for `adapt`.
      capacity: the largest number of adapters; None for as many as ``members``. Or by
        rank, ``{8: 100, 64: 4}``: room for 100 adapters of a rank up to 8 and 4 of up
        to 64, of which an adapter gets the smallest that it fits.
      ranks: the largest rank to allow, by path, where those of ``members`` are smaller
        and ``capacity`` names none.
      absent: paths of ``params`` that the base lacks, such as a new head: every
        adapter must bring them, and a row without an adapter has NaN there.

    Attributes:
      module: applies the adapters; ``module.apply(bank.variables(names), inputs)``.
      way: how: ``"auto"``, the one that `lora_jax.ops.banked.best_way` names for each
        batch, or one of `lora_jax.ops.banked.WAYS`; set it, or let `choose` measure.
      names: names of the adapters.

    Raises:
      ValueError: if there is no member, more of them than ``capacity``, weights that
        they train in full differ in shape, or one doesn't fit the base; see `add`.

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
        capacity: int | Mapping[int, int] | None = None,
        ranks: Mapping[str, int] | None = None,
        absent: Collection[str] = (),
    ) -> None:
        rows = [row for _, targets, *_ in members.values() for row in targets]
        self._dora = any(row.dora for row in rows)
        largest = dict(ranks or {})
        for row in rows:
            largest[row.path] = max(row.rank, largest.get(row.path, 0))
        kept = classes(capacity, largest, len(members))
        if len(kept) > 1 and self._dora:
            raise ValueError(
                "capacity must be one number for DoRA, whose magnitudes can't be added "
                f"up over ranks; got {capacity}."
            )
        adapted, self._targets = None, []
        for own, _ in kept:
            alphas = {path: float(rank) for path, rank in own.items()}  # scaling 1
            config = LoRAConfig.for_layers(own, alphas, dora=self._dora)
            adapted = adapt(model, config, *example_args, deterministic=True)
            self._targets.append(adapted.targets(params))
        assert adapted is not None  # of the largest ranks
        self._adapted = adapted
        full = {name: one[2] for name, one in members.items() if len(one) > 2}
        self._trained = Trained(params, full, [size for _, size in kept], absent)
        self.params = self._trained.shared
        self._none = [neutral(params, targets) for targets in self._targets]
        self._lora = [
            jax.tree.map(lambda leaf, n=n: jnp.repeat(leaf[None], n + 1, axis=0), none)
            for none, (_, n) in zip(self._none, kept, strict=True)
        ]
        self._places: dict[str, tuple[int, int]] = {}  # class and slot
        self._way: Way = AUTO
        for name, member in members.items():
            self.add(name, *member)

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order of their addition."""
        return list(self._places)

    @property
    def capacity(self) -> int:
        """The largest number of adapters, of all ranks."""
        return sum(len(jax.tree.leaves(leaves)[0]) - 1 for leaves in self._lora)

    @property
    def module(self) -> RowAdapted:
        """Applies the adapters."""
        return RowAdapted(self._adapted, self._way)

    @property
    def way(self) -> Way:
        """How the adapters are applied."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        """Sets how the adapters are applied from now on."""
        if way not in (AUTO, *WAYS):
            raise ValueError(
                f"way must be one of {AUTO}, {', '.join(WAYS)}; got {way!r}."
            )
        if way not in (AUTO, "gather") and (others := self._needing_gather()):
            raise ValueError(
                f"way must be 'gather' for DoRA, scanned layers and layers that are "
                f"not dense; got {way!r} for {', '.join(others[:5])}."
            )
        self._way = way

    def _needing_gather(self) -> list[str]:
        return [
            row.path
            for row in self._targets[-1]
            if row.dora or row.kind != "dense" or row.contraction.batch
        ]

    def choose(
        self, names: Names, *args: Any, method: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """Measures all ways on a batch, and takes the fastest.

        Args:
          names: as for `variables`.
          *args: inputs of the model.
          method: of the model.
          **kwargs: as ``args``.

        Returns:
          The seconds of each way, the least of `ROUNDS` calls in turn.
        """
        ways = WAYS[:1] if self._needing_gather() else WAYS
        calls = {}
        for way in ways:
            self._way = way
            call = functools.partial(self.module.apply, method=method, **kwargs)
            calls[way] = jax.jit(call), self.variables(names)
            jax.block_until_ready(calls[way][0](calls[way][1], *args))
        seconds: dict[str, float] = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for way, (call, variables) in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call(variables, *args))
                seconds[way] = min(seconds[way], time.perf_counter() - start)
        self._way = min(ways, key=lambda way: seconds[way])
        return seconds

    def add(
        self,
        name: str,
        lora: Mapping[str, Any],
        targets: Sequence[Target],
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds an adapter, or replaces the one of that name, without recompiling.

        Args:
          name: its name.
          lora: the adapter tree.
          targets: its targets.
          trained: the weights that it trains in full. For others that members of the
            bank train it has the base's.

        Raises:
          ValueError: if the bank is full, or the adapter has layers that the bank
            lacks, or larger ranks, or is DoRA and no member was; see `fit_adapter`. Or
            if it trains weights that no member did, or of other shapes.
        """
        full = self._trained.checked(name, trained or {})
        before, last = self._places.get(name), len(self._targets) - 1
        fitting = [n for n in range(last + 1) if is_within(targets, self._targets[n])]
        free = {n: self._free(n, before) for n in fitting or [last]}
        number = next((n for n, slot in free.items() if slot is not None), last)
        try:
            if self._dora:
                lora, targets = with_magnitudes(
                    self.params, lora, targets, self._targets[0], self._none[0]
                )
            fitted = fit_adapter(lora, targets, self._targets[number])
        except ValueError as error:
            raise ValueError(
                f"adapter {name!r}: {error} The first members of a bank, and its "
                "capacity by rank, decide what fits: make one with this adapter."
            ) from error
        if (slot := free[number]) is None:
            own = [n for n, place in self._places.items() if place[0] == number]
            rank = max(row.rank for row in self._targets[number])
            size = f"{{{rank}: {len(own)}}}" if last else len(own)
            raise ValueError(
                f"the bank is full: capacity = {size}, and it holds {', '.join(own)}. "
                "Remove one, or make a larger bank."
            )
        if before is not None and before[0] != number:
            self.remove(name)
        self._lora[number] = placed(self._lora[number], slot, fitted)
        self._trained.put(full, number, slot)
        self._places[name] = number, slot

    def _free(self, number: int, before: tuple[int, int] | None) -> int | None:
        """Returns a free slot of a class: that of the adapter before, or the first."""
        if before is not None and before[0] == number:
            return before[1]
        taken = {slot for own, slot in self._places.values() if own == number}
        size = len(jax.tree.leaves(self._lora[number])[0])
        return min(set(range(1, size)) - taken, default=None)

    def remove(self, name: str) -> None:
        """Removes an adapter.

        Args:
          name: its name.

        Raises:
          ValueError: if there is no such adapter.
        """
        if name is None:
            raise ValueError("name must be an adapter's; None is the base alone.")
        self.slots([name])  # raises if it is unknown
        number, slot = self._places.pop(name)
        self._lora[number] = placed(self._lora[number], slot, self._none[number])

    def slots(self, names: Names) -> tuple[jax.Array, ...]:
        """Returns the place of each row's adapter among those of each rank class.

        Args:
          names: one for each row, or a list for each row with one for each token.

        Returns:
          For each class int32 indices ``[b]`` or ``[b, t]`` into its leaves, 0 for an
          adapter of another class or None.

        Raises:
          ValueError: listing the names that the bank doesn't have, or if there are
            none, or rows differ in tokens.
          TypeError: if a name is neither a string nor None.
        """
        of_rows = [isinstance(n, str) or not isinstance(n, Collection) for n in names]
        pairs = zip(names, of_rows, strict=True)
        rows: Any = [[row] if is_one else row for row, is_one in pairs]
        known = {None: (0, 0), **self._places}
        every = dict.fromkeys(name for row in rows for name in row)
        bad = [name for name in every if not (name is None or isinstance(name, str))]
        if bad or isinstance(names, str):
            raise TypeError(
                "names must be a list of strings or None, one for each row; got "
                f"{bad[:5] or repr(names)}."
            )
        if unknown := [name for name in every if name not in known]:
            hints = [
                f"{name!r} (did you mean {nearest(str(name), self.names)!r}?)"
                for name in unknown
            ]
            raise ValueError(f"the bank has no adapter {', '.join(hints)}.")
        if len({len(row) for row in rows}) != 1 or not len(rows[0]):
            raise ValueError(
                "names must be one for each row, or as many in each row as tokens; got "
                f"rows of {sorted({len(row) for row in rows})}."
            )
        found = np.array([[known[name] for name in row] for row in rows], np.int32)
        if all(of_rows):
            found = found[:, 0]
        return tuple(
            jnp.asarray(np.where(found[..., 0] == number, found[..., 1], 0))
            for number in range(len(self._lora))
        )

    def variables(self, names: Names) -> dict[str, PyTree]:
        """Returns the variables for a batch, for the `way` of now.

        Args:
          names: each row's adapter, None for the base alone; or for each row a list
            with each token's.

        Returns:
          For `RowAdapted.apply`: ``{"frozen": base, "lora": leaves [b, ...]}`` of the
          rows' adapters, or all adapters of the bank and the rows' ``slots``; with
          ``params`` ``[b, ...]`` if adapters train weights in full.

        Raises:
          ValueError: for adapters of tokens that need their rows' own weights.
        """
        slots = self.slots(names)
        is_of_rows, others = slots[0].ndim == 1, self._needing_gather()
        if not is_of_rows and (others := [*others, *self._trained.paths]):
            raise ValueError(
                "names must be one for each row: tokens' adapters need dense layers "
                f"that are not scanned, without DoRA or weights trained in full; got "
                f"{others[0]}."
            )
        variables = {FROZEN: self.params}
        if self._trained.paths:
            variables[PARAMS] = self._trained.of_rows(slots)
        if is_of_rows and (others or self._way_of(len(slots[0])) == "gather"):
            return {**variables, LORA: gathered(self._lora, slots)}
        return {**variables, LORA: list(self._lora), SLOTS: list(slots)}

    def _way_of(self, rows: int) -> Way:
        """Returns the way for rows of a token, which long generation consists of."""
        auto = self._way == AUTO
        return best_way(rows, 1, self.capacity) if auto else self._way

    def adapter(self, name: str | None) -> dict[str, PyTree]:
        """Returns the variables of one adapter, for ``bank.module.adapted.apply``.

        Args:
          name: of the adapter, None for the base alone.

        Returns:
          ``{"frozen": base, "lora": adapter}``, and its ``params``.
        """
        slots = self.slots([name])
        found = {LORA: gathered(self._lora, slots)}
        if self._trained.paths:
            found[PARAMS] = self._trained.of_rows(slots)
        one = jax.tree.map(lambda leaf: leaf[0], found)
        return {FROZEN: self.params, **one}
