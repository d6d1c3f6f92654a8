"""What a function is traced for: the mesh, and the platform of its devices."""

import jax
from jax.sharding import AbstractMesh

from lora_jax.names import BATCH_AXES


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of `on_mesh_of`, or None outside of it and on other meshes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.shape) else None


def target_platform() -> str:
    """Returns the platform to compile for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    On a mesh it is that of its devices, which may not be on this machine.
    """
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device() -> str:
    """Returns JAX's ``device_kind`` to compile for, such as ``"TPU v5 lite"``."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
