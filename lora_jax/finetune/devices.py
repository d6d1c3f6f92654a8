"""The devices of a run: the mesh of its settings, and what is laid out on it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.finetune.settings import RunSettings
from lora_jax.parallel.mesh import AXES, BATCH, make_mesh, process_rows, shard_batch
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
    """Where weights and batches go.

    Attributes:
      mesh: None for one device, on which nothing is laid out.
      sharding: of the weights.
      note: what there is to say about the choice.
    """

    mesh: Mesh | None = None
    sharding: WeightSharding | None = None
    note: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's axes."""
        return dict(self.mesh.shape) if self.mesh is not None else ONE

    @property
    def everywhere(self) -> NamedSharding | None:
        """Where every device has the whole of an array."""
        return self.mesh and NamedSharding(self.mesh, PartitionSpec())

    @property
    def parts(self) -> int:
        """How many parts a batch is cut into."""
        return math.prod(self.sizes[axis] for axis in BATCH)

    def rows(self, wanted: int) -> int:
        """Returns the least number of rows from ``wanted`` up that divides."""
        return -(-wanted // self.parts) * self.parts

    def place(
        self, variables: Mapping[str, PyTree], targets: Sequence[Target]
    ) -> dict[str, PyTree]:
        """Lays variables out; those that lie where they belong are not moved."""
        if self.sharding is None:
            return dict(variables)
        return shard_variables(variables, self.sharding, targets)

    def feed(self, batches: Schedule) -> Callable[[int], Any]:
        """Returns the batch of a step, spread: each process forms its own rows alone.

        Args:
          batches: whose rows divide over the mesh.

        Returns:
          A function of the step's number.
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
        """Yields each row of evaluation batches once, and says how far it is."""
        batch_at = self.feed(batches)
        for number in range(batches.steps_per_epoch):
            yield batch_at(number)
            tick(number + 1, "batches")

    def describe(self) -> str:
        """Words the mesh."""
        shown = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        count = jax.process_count()
        return shown + (f", {count} processes" if count > 1 else "")


def open_devices(settings: RunSettings, *, is_strict: bool = True) -> Devices:
    """Arranges the devices of all processes as the settings say.

    Args:
      settings: of the run, with ``mesh``.
      is_strict: whether other devices than the mesh needs are an error; else one device
        does what can be done on one, and a note says so.

    Returns:
      The devices.

    Raises:
      ValueError: if the mesh doesn't fit the devices; names the nearest that does.
    """
    own = settings.mesh
    sizes = {axis: getattr(own, axis) for axis in AXES}
    try:
        mesh = make_mesh(**sizes)
    except ValueError as error:
        if is_strict:
            raise ValueError(f"mesh: {error}") from error
        return Devices(note=f"one of {jax.device_count()}; the run's was {sizes}")
    if mesh.size == 1:
        return Devices()
    rules = mesh_rules(settings)
    return Devices(mesh, make_sharding(mesh, rules, uneven=own.uneven))


def mesh_rules(settings: RunSettings) -> Rules:
    """Returns the rules of the settings, as `make_sharding` takes them."""
    rules = settings.mesh.rules
    return [(path, PartitionSpec(*axes)) for path, axes in rules.items()]


def check_batch(settings: RunSettings, devices: Devices) -> None:
    """Raises unless a step's batch divides over the devices.

    Args:
      settings: of the run.
      devices: its devices.

    Raises:
      ValueError: naming the numbers, and the nearest batch sizes that divide.
    """
    train, parts = settings.train, devices.parts
    unit = parts * train.accumulate
    if train.batch_size % unit:
        low = train.batch_size // unit * unit
        nearest = f"{low} or {low + unit}" if low else f"{unit}"
        sizes = devices.sizes
        raise ValueError(
            "train.batch_size must be a multiple of data x fsdp x accumulate = "
            f"{sizes['data']} x {sizes['fsdp']} x {train.accumulate} = {unit} on a mesh"
            f" of {devices.describe()}; got {train.batch_size}. Take {nearest}, or "
            "another mesh."
        )
