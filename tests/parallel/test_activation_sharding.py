"""Activations stay sharded like the batch; without a mesh it is a no-op."""

import jax
import jax.numpy as jnp

from lora_jax.parallel.activation_sharding import (
    current_mesh,
    num_row_shards,
    on_mesh_of,
    shard_rows,
    target_platform,
)
from lora_jax.parallel.mesh import make_mesh


def test_without_a_mesh_constraints_are_no_ops():
    x = jnp.ones((4, 2))
    assert shard_rows(x) is x
    assert current_mesh() is None
    assert num_row_shards() == 1
    assert target_platform() == jax.default_backend()
    with on_mesh_of(None):
        assert current_mesh() is None


def test_a_mesh_is_visible_only_inside_its_context():
    mesh = make_mesh(devices=jax.devices()[:1])
    with on_mesh_of(mesh):
        assert current_mesh() == mesh.abstract_mesh
        assert num_row_shards() == 1
        assert target_platform() == jax.devices()[0].platform
    assert current_mesh() is None


def test_meshes_with_other_axes_are_ignored():
    other = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(other.abstract_mesh):
        assert current_mesh() is None
