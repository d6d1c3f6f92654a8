"""The devices of a run: its mesh, and sharding weights and batches over it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.finetune.settings import RunSettings
from lora_jax.names import SEQUENCE
from lora_jax.parallel.mesh import (
    AXES,
    BATCH,
    MORE_AXES,
    make_mesh,
    process_rows,
    shard_batch,
)
from lora_jax.parallel.rules import (
    Rules,
    WeightSharding,
    make_sharding,
    shard_variables,
)
from lora_jax.train.buckets import Batch, Schedule
from lora_jax.tree.targets import Target

ONE: dict[str, int] = dict.fromkeys(AXES, 1)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices for weights and batches.

    Attributes:
      mesh: the mesh, or None for one device.
      sharding: sharding of the weights.
      note: a remark about the choice.
    """

    mesh: Mesh | None = None
    sharding: WeightSharding | None = None
    note: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes."""
        return dict(self.mesh.shape) if self.mesh is not None else ONE

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding that replicates an array."""
        return self.mesh and NamedSharding(self.mesh, PartitionSpec())

    @property
    def parts(self) -> int:
        """The number of shards of a batch."""
        return math.prod(self.sizes[axis] for axis in BATCH)

    @property
    def token_unit(self) -> int:
        """What a row's tokens must be a multiple of; see `parallel.sequence`."""
        shards = self.sizes.get(SEQUENCE, 1)
        return 1 if shards == 1 else 2 * shards

    def rows(self, wanted: int) -> int:
        """Returns the smallest valid number of rows that is at least ``wanted``."""
        return -(-wanted // self.parts) * self.parts

    def place(
        self, variables: Mapping[str, PyTree], targets: Sequence[Target]
    ) -> dict[str, PyTree]:
        """Shards variables; those that already have their sharding are not moved."""
        if self.sharding is None:
            return dict(variables)
        return shard_variables(variables, self.sharding, targets)

    def feed(self, batches: Schedule) -> Callable[[int], Any]:
        """Returns a function from a step number to its sharded batch.

        Each process builds only its own rows.
        """
        mesh = self.mesh
        if mesh is None:
            return batches.batch_at
        rows = process_rows(batches.batch_size, mesh)

        def batch_at(step: int) -> Batch:
            return shard_batch(batches.batch_at(step, rows), mesh, is_local=True)

        return batch_at

    def one_epoch(
        self,
        batches: Schedule,
        tick: Callable[[int, str], None] = lambda n, note: None,
    ) -> Iterator[Any]:
        """Yields evaluation batches with each row once, reporting progress."""
        batch_at = self.feed(batches)
        for number in range(batches.steps_per_epoch):
            yield batch_at(number)
            tick(number + 1, "batches")

    def describe(self) -> str:
        """Describes the mesh."""
        shown = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        count = jax.process_count()
        return shown + (f", {count} processes" if count > 1 else "")


def open_devices(settings: RunSettings, *, is_strict: bool = True) -> Devices:
    """Makes the mesh of the settings from the devices of all processes.

    Args:
      settings: settings of the run, with ``mesh``.
      is_strict: whether a mesh that does not match the devices is an error; otherwise
        a single device is used, with a note.

    Returns:
      The devices.

    Raises:
      ValueError: if the mesh does not match the devices; suggests the nearest one.
    """
    own = settings.mesh
    if own.member > 1 and is_strict:
        raise ValueError(
            f"mesh.member must be 1 for a run of its own; got {own.member}. It splits "
            "the runs of a sweep over devices: `lora-jax sweep`."
        )
    sizes = {axis: getattr(own, axis) for axis in (*AXES, *MORE_AXES)}
    try:
        mesh = make_mesh(**sizes)
    except ValueError as error:
        if is_strict:
            raise ValueError(f"mesh: {error}") from error
        return Devices(note=f"one of {jax.device_count()}; the run used {sizes}")
    if mesh.size == 1:
        return Devices()
    rules = mesh_rules(settings)
    return Devices(mesh, make_sharding(mesh, rules, uneven=own.uneven))


def mesh_rules(settings: RunSettings) -> Rules:
    """Returns the settings' rules in the form that `make_sharding` takes."""
    rules = settings.mesh.rules
    return [(path, PartitionSpec(*axes)) for path, axes in rules.items()]


def check_batch(settings: RunSettings, devices: Devices) -> None:
    """Raises a `ValueError` unless the batch size is divisible over the devices."""
    train, parts = settings.train, devices.parts
    unit = parts * train.accumulate
    if train.batch_size % unit:
        low = train.batch_size // unit * unit
        nearest = f"{low} or {low + unit}" if low else f"{unit}"
        sizes = devices.sizes
        raise ValueError(
            "train.batch_size must be a multiple of data x fsdp x accumulate = "
            f"{sizes['data']} x {sizes['fsdp']} x {train.accumulate} = {unit} on a mesh"
            f" of {devices.describe()}; got {train.batch_size}. Use {nearest}, or "
            "another mesh."
        )
