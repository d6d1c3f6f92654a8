"""Ring attention as it is traced; what it computes is in tests/parallel."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from lora_jax.attention import ring
from lora_jax.attention.ring import ring_attention


def test_a_ring_needs_a_mesh():
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match="a mesh with an axis 'sequence'; got none"):
        ring_attention(x, x, x, jnp.arange(4), scale=1.0)


def test_no_mask_of_all_blocks_is_kept_for_scanned_layers(monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 4)  # 4 blocks on each of 4 devices
    axes = ("data", "fsdp", "tensor", "sequence")
    mesh = AbstractMesh((1, 1, 1, 4), axes, axis_types=(AxisType.Auto,) * 4)
    x = jnp.ones((1, 64, 2, 3))

    def loss(x):
        def layer(x, _):
            return ring_attention(x, x, x, jnp.arange(64), scale=0.1), None

        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0])

    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(jax.grad(loss))(x))
    shapes = re.findall(r"(?:bool|f32)\[([\d,]+)\]", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) == 2 * x.size  # what both layers keep
