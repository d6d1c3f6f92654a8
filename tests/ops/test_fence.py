"""Arrays that are finished before they are used, on TPU."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.ops import fence
from lora_jax.ops.fence import fence_gradient, fence_output


def lowered(around, x, derivative=jax.grad):
    return jax.jit(derivative(lambda x: jnp.sum(jnp.sin(around(x))))).lower(x)


def hessian_product(f):
    return lambda x: jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),))[1]


@pytest.mark.parametrize("around", [fence_gradient, fence_output])
@pytest.mark.parametrize(
    ("platform", "size", "count"), [("tpu", 4, 1), ("tpu", 3, 0), ("gpu", 4, 0)]
)
def test_only_a_tpus_large_arrays_have_a_fence(
    monkeypatch, around, platform, size, count
):
    monkeypatch.setattr(fence, "target_platform", lambda: platform)
    monkeypatch.setattr(fence, "MIN_BYTES", 16)
    text = lowered(around, jnp.ones(size, jnp.float32)).as_text()
    assert text.count("optimization_barrier") == count


@pytest.mark.parametrize("around", [fence_gradient, fence_output])
def test_a_fence_changes_no_value(monkeypatch, around):
    x = jnp.arange(4.0)
    wanted = lowered(around, x).compile()(x)
    monkeypatch.setattr(fence, "target_platform", lambda: "tpu")
    monkeypatch.setattr(fence, "MIN_BYTES", 0)
    assert lowered(around, x).compile()(x).tolist() == wanted.tolist()
    assert around(x).tolist() == x.tolist()
    product = lowered(around, x, hessian_product).compile()(x)
    assert jnp.allclose(product, -jnp.sin(x), rtol=1e-6)
