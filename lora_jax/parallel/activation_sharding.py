"""Activations on a mesh: rows stay on the devices that the batch was put on.

XLA chooses itself how an array that nobody placed is spread over devices. Where kernels
are cut over the axis that cuts the batch too, it may choose to cut activations by their
features and put every row on every device. So a compiled step says on which mesh it is,
and a model where its rows are. Without a mesh all of this does nothing.
"""

import contextlib
import math

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax.array_types import AnyFloat
from lora_jax.names import BATCH_AXES, TENSOR


def on_mesh_of(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a function is traced for a mesh.

    Args:
      mesh: from `make_mesh`, or None: then the context changes nothing.

    Returns:
      The context, to be entered inside the function that is traced.
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of `on_mesh_of`, None outside of it and on other meshes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.shape) else None


def target_platform() -> str:
    """Returns what is compiled for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    Of a mesh it is that of its devices, which need not be this machine's.
    """
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def row_parts() -> int:
    """Returns over how many devices the rows of a batch are spread."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_rows(x: AnyFloat) -> AnyFloat:
    """Keeps the rows of ``[b, ...]`` on the devices that the batch was put on.

    Args:
      x: activations; their first axis is the batch's.

    Returns:
      ``x``. Its other axes are whole on each device.
    """
    parts = row_parts()
    if parts == 1 or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_kernel(kernel: AnyFloat) -> AnyFloat:
    """Gathers a kernel ``[i, o]`` once, for a loop that reads it many times.

    Args:
      kernel: cut over any axes of the mesh.

    Returns:
      The kernel, whole over the axes that split the batch; its outputs stay cut over
      ``tensor``.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or kernel.shape[1] % mesh.shape[TENSOR]:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, TENSOR))
