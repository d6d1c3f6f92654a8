"""Sharding constraints that keep activations sharded by rows and tokens on a mesh.

XLA chooses the sharding of unconstrained arrays. If kernels are sharded over the same
axis as the batch, it may shard activations by features and replicate their rows. So a
compiled step declares its mesh, and the model constrains the rows of its activations.
Without a mesh, all of this is a no-op.
"""

import contextlib
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from lora_jax.array_types import AnyFloat
from lora_jax.names import BATCH_AXES, SEQUENCE, TENSOR
from lora_jax.ops.target import current_mesh as current_mesh
from lora_jax.ops.target import target_platform as target_platform


def on_mesh_of(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Returns a context to enter inside a function traced for a mesh, if any."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def num_row_shards() -> int:
    """Returns the number of shards of a batch's rows."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_rows(x: AnyFloat) -> AnyFloat:
    """Constrains activations ``[b, t, ...]`` to be sharded like the batch.

    That is by rows, and by tokens on a mesh with ``sequence``.
    """
    mesh, parts = current_mesh(), num_row_shards()
    if mesh is None or x.shape[0] % parts:
        return x
    pieces = mesh.shape.get(SEQUENCE, 1)
    if pieces > 1 and x.ndim > 2 and x.shape[1] % pieces == 0:
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, SEQUENCE))
    if parts == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_kernel(kernel: AnyFloat) -> AnyFloat:
    """Gathers a kernel ``[i, o]`` once, for a loop that reads it repeatedly.

    It is gathered over the batch axes; its outputs stay sharded over ``tensor``.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or kernel.shape[1] % mesh.shape[TENSOR]:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, TENSOR))
