"""Device meshes, and batches sharded over them.

A mesh has three axes, each possibly of size 1. ``data`` and ``fsdp`` both split the
batch; ``fsdp`` also splits every frozen kernel, gathered by each layer when used;
``tensor`` splits the outputs of layers and the inputs of the layers after them. Two
more are there if above 1: ``expert`` splits experts, ``sequence`` the rows of tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.names import (
    BATCH_AXES,
    DATA,
    EXPERT,
    FSDP,
    MESH_AXES,
    SEQUENCE,
    TENSOR,
)
from lora_jax.parallel.activation_sharding import current_mesh
from lora_jax.parallel.sequence import check_length
from lora_jax.tree.paths import leaves_by_path

AXES, BATCH = MESH_AXES, BATCH_AXES
MORE_AXES = (EXPERT, SEQUENCE)  # only of a mesh where they are above 1


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a device mesh.

    Args:
      data: number of device groups, each with a copy of the model and part of the
        batch.
      fsdp: number of devices that shard each copy's kernels and its part of the batch.
      tensor: number of devices that shard each layer's outputs. One of the three sizes
        may be -1 for the remaining devices.
      expert: number of devices that share the experts of a mixture; the rest of the
        model is copied to each of them.
      sequence: number of devices that share the tokens of each row; see
        `lora_jax.parallel.sequence`.
      devices: the devices; all devices of all processes if None.

    Returns:
      A mesh with axes ``data``, ``fsdp``, ``tensor``, and ``expert`` and ``sequence``
      where they are above 1.

    Raises:
      ValueError: if a size is neither positive nor -1, two are -1, ``expert`` or
        ``sequence`` does not divide the devices, or the product is not their number;
        suggests the nearest valid sizes.

    Example:
      >>> dict(make_mesh(tensor=1, devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    more, rest = {EXPERT: expert, SEQUENCE: sequence}, len(devices)
    for name, size in more.items():
        if type(size) is not int or size < 1 or rest % size:
            raise ValueError(
                f"{name} must divide the {rest} devices"
                f"{' that expert leaves' if rest < len(devices) else ''}; got {size!r}."
            )
        rest //= size
    sizes = _sizes({DATA: data, FSDP: fsdp, TENSOR: tensor}, rest)
    used = {name: size for name, size in more.items() if size > 1}
    sizes, axes = (*sizes, *used.values()), (*AXES, *used)
    return jax.make_mesh(
        sizes, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices
    )


def _sizes(wanted: dict[str, int], count: int) -> tuple[int, ...]:
    """Returns the three sizes with -1 resolved, or raises."""
    shown = _shown(wanted)
    is_valid = all(type(s) is int and (s >= 1 or s == -1) for s in wanted.values())
    open_axes = [name for name, size in wanted.items() if size == -1]
    if not is_valid or len(open_axes) > 1:
        raise ValueError(
            "a mesh must have positive sizes, of which one may be -1 for the rest; got "
            f"{shown}."
        )
    fixed = math.prod(size for size in wanted.values() if size != -1)
    if open_axes and count % fixed == 0:
        return tuple(count // fixed if s == -1 else s for s in wanted.values())
    if not open_axes and fixed == count:
        return tuple(wanted.values())
    factors = [str(s) for s in wanted.values() if s != -1]
    raise ValueError(
        f"a mesh of {shown} must {'divide' if open_axes else 'take all of'} the "
        f"{count} devices; {' x '.join(factors)} = {fixed} does not. The nearest that "
        f"works: {_shown(_nearest_mesh(wanted, count))}."
    )


def _shown(sizes: dict[Any, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def _nearest_mesh(wanted: dict[str, int], count: int) -> dict[str, int]:
    """Returns the sizes nearest to the given ones whose product is ``count``.

    Changes ``data`` first, since ``fsdp`` and ``tensor`` make the model fit in memory.
    """
    rest = next((name for name, size in wanted.items() if size == -1), DATA)
    best = {}
    for name in (TENSOR, FSDP, DATA):
        if name != rest:
            left = count // math.prod(best.values())
            best[name] = nearest_divisor(left, wanted[name])
    best[rest] = count // math.prod(best.values())
    return {name: best[name] for name in AXES}


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of ``number`` nearest to ``wanted``; the smaller if tied.

    Example:
      >>> nearest_divisor(12, 5)
      4
    """
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def batch_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Returns the sharding of a batch's leaf: rows over ``data`` and ``fsdp``.

    Args:
      mesh: from `make_mesh`.
      ndim: axes of the leaf; the second is split over ``sequence``, if there is one.
    """
    if ndim > 1 and SEQUENCE in mesh.shape:
        return NamedSharding(mesh, PartitionSpec(BATCH, SEQUENCE))
    return NamedSharding(mesh, PartitionSpec(BATCH))


def whole_over_batch(sharding: NamedSharding) -> NamedSharding:
    """Returns the same sharding, but unsharded over ``data`` and ``fsdp``."""

    def kept(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in names if name not in BATCH) or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(kept, sharding.spec)))


def process_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Returns which rows of a global batch this process must read.

    Args:
      rows: number of rows in the global batch.
      mesh: the mesh the batch is sharded over.

    Returns:
      The indices of the rows on this process's devices, in order.

    Raises:
      ValueError: if the rows are not divisible over the mesh.
    """
    check_rows({"batch": rows}, mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    spans = {index[0].indices(rows)[:2] for index in indices.values() if index}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def shard_batch(batch: PyTree, mesh: Mesh, *, is_local: bool = False) -> PyTree:
    """Shards a batch over the devices of a mesh: its rows, and their tokens.

    Args:
      batch: leaves ``[b, ...]`` on the host: the same global batch on every process, of
        which each uses its own rows.
      mesh: from `make_mesh`.
      is_local: whether ``batch`` contains only this process's rows, as given by
        `process_rows`.

    Returns:
      The global batch, sharded by rows; on a mesh with ``sequence`` the second axis of
      every leaf that has one is split too.

    Raises:
      ValueError: if the rows are not divisible by ``data * fsdp``, or the tokens by
        ``2 * sequence``; suggests the nearest number.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> tuple(shard_batch({"x": np.ones((4, 2))}, mesh)["x"].sharding.spec)
      (('data', 'fsdp'),)
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    own = len(process_rows(parts, mesh)) if is_local else parts

    def whole(leaf: Any) -> int:
        return np.shape(leaf)[0] * parts // own if np.ndim(leaf) else 0

    leaves = leaves_by_path(batch)
    rows = {path or "batch": whole(leaf) for path, leaf in leaves.items()}
    check_rows(rows, mesh)
    for leaf in leaves.values():
        if np.ndim(leaf) > 1:
            check_length(np.shape(leaf)[1], mesh.shape)

    def put(leaf: Any) -> jax.Array:
        sharding = batch_sharding(mesh, np.ndim(leaf))
        if not is_local:
            return put_array(leaf, sharding)
        mine = process_rows(whole(leaf), mesh)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(whole(leaf))
            rows = leaf[np.searchsorted(mine, start) :][: stop - start]
            return rows[:, *index[1:]]

        shape = (whole(leaf), *np.shape(leaf)[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def check_rows(rows: dict[str, int], mesh: Mesh, *, accumulate: int = 1) -> None:
    """Raises unless every number of rows is divisible over the mesh's batch axes.

    Args:
      rows: number of rows of each batch leaf, by name.
      mesh: from `make_mesh`.
      accumulate: number of microbatches, each of which must be divisible.

    Raises:
      ValueError: listing the leaves and suggesting the nearest valid numbers.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH) * accumulate
    wrong = {name: n for name, n in rows.items() if n < 1 or n % parts}
    if wrong:
        low = max(wrong.values()) // parts * parts
        nearest = f"{low} or {low + parts}" if low else f"{parts}"
        also, times = "", ""
        if accumulate > 1:
            also, times = " x accumulate", f" x {accumulate}"
        raise ValueError(
            f"the rows of a batch must be divisible by data x fsdp{also} = "
            f"{mesh.shape[DATA]} x {mesh.shape[FSDP]}{times} = {parts}; got "
            f"{', '.join(f'{name} {n}' for name, n in wrong.items())}. Take {nearest}."
        )


def put_array(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards an array that every process holds over the devices of all processes.

    No communication: each process slices out the shards of its own devices. ``value``
    may also be sharded already.
    """
    is_global = isinstance(value, jax.Array) and not value.is_fully_addressable
    if is_global or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        data = put_array(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.array(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def promote_table(*arrays: Any, **options: Any) -> list[Any]:
    """The ``promote_dtype`` of `flax.linen.Embed` that also gathers table columns.

    For a lookup in a table sharded along both axes, XLA gathers the whole table. If it
    is sharded only by rows, each device looks up its own rows. The table ``[v, d]`` is
    the last of ``arrays``, optionally preceded by a query.
    """
    *others, table = promote_dtype(*arrays, **options)
    if current_mesh() is not None:
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
        table = jax.lax.with_sharding_constraint(table, spec)
    return [*others, table]


def mesh_of(tree: PyTree) -> Mesh | None:
    """Returns the first multi-device mesh that a tree is sharded over, or None."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh  # pyright: ignore[reportReturnType] - no AbstractMesh
    return None


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates leaves that are not on a mesh yet over all of its devices."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        is_there = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if is_there else put_array(leaf, everywhere)

    return jax.tree.map(put, tree)
