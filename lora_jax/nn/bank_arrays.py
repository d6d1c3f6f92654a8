"""The arrays of a bank: A and B by rank class, and the weights trained in full."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import PyTree
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE
from lora_jax.ops.dora import adapted_norm
from lora_jax.tree.merge import check_adapters
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


class Trained:
    """The weights that adapters of a bank train in full: an array for each adapter.

    Args:
      params: of the base.
      members: those of each adapter that trains any.
      sizes: the number of adapters of each class.
      absent: paths in ``params`` that the base has only the shapes of.

    Attributes:
      paths: of the weights, sorted.
      absent: those that every adapter must bring; of no adapter they are NaN.
      shared: the base's parameters without them.

    Raises:
      ValueError: listing every weight whose shape differs between adapters, or from the
        base's.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        members: Mapping[str, Mapping[str, Any]],
        sizes: Sequence[int],
        absent: Collection[str] = (),
    ) -> None:
        flat, trained = flatten(params), {n: flatten(t) for n, t in members.items()}
        if lost := {
            f"{path} of {name}"
            for name, tree in trained.items()
            for path in tree
            if path not in flat
        }:
            raise ValueError(
                "weights that adapters of a bank train in full must be the base's, "
                f"such as a head; {', '.join(sorted(lost))} is not (rows of tokens "
                "differ in their tokens)."
            )
        shapes: dict[str, dict[tuple[int, ...], list[str]]] = {}
        dtypes: dict[str, Any] = {}
        for name, tree in trained.items():
            for path, leaf in tree.items():
                shape = jnp.shape(flat[path])
                own = shapes.setdefault(
                    path, {} if path in absent else {shape: ["the base"]}
                )
                own.setdefault(jnp.shape(leaf), []).append(name)
                dtypes[path] = jnp.result_type(leaf, dtypes.get(path, leaf))
        faults = [
            f"{path} is "
            + ", ".join(f"{list(s)} of {' and '.join(n)}" for s, n in own.items())
            for path, own in shapes.items()
            if len(own) > 1
        ]
        if faults:
            raise ValueError(
                "weights that adapters of a bank train in full must have one shape: "
                f"{'; '.join(faults)}. Make a bank for each."
            )
        self.paths = sorted(shapes)
        self.absent = [path for path in self.paths if path in absent]
        self.shared = unflatten(
            {p: leaf for p, leaf in flat.items() if p not in shapes}
        )
        self._firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._base = {
            path: jnp.full_like(flat[path], jnp.nan, dtype)
            if path in absent
            else jnp.asarray(flat[path], dtype)
            for path, dtype in dtypes.items()
        }
        self._leaves: PyTree = {
            path: jnp.repeat(leaf[None], sum(sizes) + 1, axis=0)
            for path, leaf in self._base.items()
        }

    def checked(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an adapter's weights, the base's where it trains none.

        Args:
          name: of the adapter.
          tree: what it trains.

        Raises:
          ValueError: listing every weight that the bank lacks, or has in another shape,
            and those of which neither the adapter nor the base has any.
        """
        own = flatten(tree)
        faults = []
        for path, leaf in own.items():
            if path not in self._base:
                faults.append(
                    f"{path}, which no adapter that the bank was made with does"
                )
            elif jnp.shape(leaf) != self._base[path].shape:
                wanted = list(self._base[path].shape)
                faults.append(f"{path} {list(jnp.shape(leaf))}, not {wanted}")
        if faults:
            raise ValueError(f"adapter {name!r} trains {'; '.join(faults)}.")
        if lost := [path for path in self.absent if path not in own]:
            raise ValueError(
                f"adapter {name!r} must have {', '.join(lost)}, which others train and "
                "the base lacks."
            )
        return {**self._base, **own}

    def put(self, tree: Mapping[str, Any], number: int, slot: int) -> None:
        """Keeps an adapter's weights, from `checked`, at its class and place there."""
        if self.paths:
            place = self._firsts[number] + slot
            self._leaves = placed(self._leaves, place, dict(tree))

    def of_rows(self, slots: Sequence[jax.Array]) -> PyTree:
        """Returns the weights of each row, a tree of leaves ``[b, ...]``.

        Args:
          slots: the places of the rows' adapters in each class, see `AdapterBank`.
        """
        pairs = zip(slots, self._firsts, strict=True)
        places = sum(jnp.where(own > 0, first + own, 0) for own, first in pairs)
        return unflatten(gathered([self._leaves], [jnp.asarray(places)]))


def classes(
    capacity: int | Mapping[int, int] | None, largest: Mapping[str, int], count: int
) -> list[tuple[dict[str, int], int]]:
    """Returns the rank of every layer, and the number of adapters, of each class."""
    by_rank = capacity.items() if isinstance(capacity, Mapping) else [(capacity, 1)]
    if bad := [n for pair in by_rank for n in pair if not isinstance(n, int | None)]:
        raise TypeError(f"capacity must consist of whole numbers; got {bad}.")
    if not isinstance(capacity, Mapping):
        size = count if capacity is None else capacity
        if not 0 < count <= size:
            raise ValueError(
                f"a bank must have from 1 to capacity = {size} members; got {count}."
            )
        return [(dict(largest), size)]
    wrong = [f"{rank}: {n}" for rank, n in capacity.items() if rank < 1 or n < 1]
    if wrong or not count or not capacity:
        raise ValueError(
            f"capacity must be numbers of adapters by rank, both at least 1, for at "
            f"least 1 member; got {dict(capacity)} for {count}."
        )
    return [(dict.fromkeys(largest, rank), n) for rank, n in sorted(capacity.items())]


def is_within(targets: Sequence[Target], rows: Sequence[Target]) -> bool:
    """Returns whether an adapter's ranks are at most those of a class."""
    ranks = {row.path: row.rank for row in rows}
    return all(row.rank <= ranks.get(row.path, 0) for row in targets)


def neutral(params: Mapping[str, Any], targets: Sequence[Target]) -> PyTree:
    """Returns the adapter that changes nothing."""
    flat, leaves = flatten(params), {}
    for row in targets:
        for leaf, shape in zip((LORA_A, LORA_B), row.factor_shapes, strict=True):
            leaves[child(row.path, leaf)] = jnp.zeros(shape)
        if row.dora:
            m = row.init_magnitude(flat[row.weight_path])
            leaves[child(row.path, MAGNITUDE)] = m
    return unflatten(leaves)


def with_magnitudes(
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    targets: Sequence[Target],
    wide: Sequence[Target],
    none: PyTree,
) -> tuple[PyTree, list[Target]]:
    """Returns an adapter as DoRA of all layers of a bank: the same function.

    ``m = ‖W0 + s A B‖`` makes DoRA of LoRA, and ``m = ‖W0‖`` of no adapter.

    Args:
      params: the base.
      lora: the adapter tree, which matches ``targets``.
      targets: its targets.
      wide: the bank's.
      none: the adapter of ``wide`` that changes nothing.
    """
    leaves, kernels, neutrals = flatten(lora), flatten(params), flatten(none)
    check_adapters(leaves, targets)
    known, rows = {row.path: row for row in wide}, []
    for row in targets:
        same = known.pop(row.path, None)
        if same is not None and same.is_same_layer(row) and not row.dora:
            factors = (leaves[child(row.path, leaf)] for leaf in (LORA_A, LORA_B))
            roles: dict[str, Any] = {"contraction": row.contraction}
            kernel = jnp.asarray(kernels[row.weight_path])
            a, b = map(jnp.asarray, row.batch_first(*factors))
            m = adapted_norm(kernel, a, b, scaling=row.scaling, **roles)
            m = jnp.moveaxis(m, range(len(row.scanned_m)), row.scanned_m)
            leaves[child(row.path, MAGNITUDE)] = m
            row = dataclasses.replace(row, dora=True, leaves=same.leaves)
        rows.append(row)
    for row in known.values():
        for name in (LORA_A, LORA_B, MAGNITUDE):
            leaves[child(row.path, name)] = neutrals[child(row.path, name)]
        rows.append(row)
    return unflatten(leaves), rows


@functools.partial(jax.jit, donate_argnums=0)
def placed(lora: PyTree, slot: int, one: PyTree) -> PyTree:
    """Returns a bank with an adapter at a place; takes the memory of the one before."""
    return jax.tree.map(lambda all_, new: all_.at[slot].set(new), lora, one)


@jax.jit
def gathered(banks: Sequence[PyTree], slots: Sequence[jax.Array]) -> PyTree:
    """Takes the adapter of each row, from the one class that has it."""
    *others, largest = (
        jax.tree.map(lambda leaf, own=own: leaf[own], bank)
        for bank, own in zip(banks, slots, strict=True)
    )

    def add(wide: jax.Array, narrow: jax.Array) -> jax.Array:
        # Of all classes but one it is zero.
        return wide.at[tuple(map(slice, narrow.shape))].add(narrow)

    for other in others:
        largest = jax.tree.map(add, largest, other)
    return largest
