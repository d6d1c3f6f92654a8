"""Rows stay on the devices of the batch; without a mesh nothing happens."""

import jax
import jax.numpy as jnp

from lora_jax.parallel.activation_sharding import (
    current_mesh,
    on_mesh_of,
    row_parts,
    shard_rows,
    target_platform,
)
from lora_jax.parallel.mesh import make_mesh


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((4, 2))
    assert shard_rows(x) is x
    assert current_mesh() is None
    assert row_parts() == 1
    assert target_platform() == jax.default_backend()
    with on_mesh_of(None):
        assert current_mesh() is None


def test_a_mesh_is_known_inside_its_context_alone():
    mesh = make_mesh(devices=jax.devices()[:1])
    with on_mesh_of(mesh):
        assert current_mesh() == mesh.abstract_mesh
        assert row_parts() == 1
        assert target_platform() == jax.devices()[0].platform
    assert current_mesh() is None


def test_meshes_of_others_are_not_ours():
    other = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(other.abstract_mesh):
        assert current_mesh() is None
