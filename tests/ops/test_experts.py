"""`lora_experts` beside the laws: DoRA, biases, what is differentiated, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops.dora import column_norm, merge_dora
from lora_jax.ops.experts import EXPERTS, expert_product, lora_experts
from tests.laws import equations, normal
from tests.reference import assert_close, experts

SIZES = jnp.array([4, 0, 5])
SCALING = 7 / 3


@pytest.fixture(scope="module")
def arrays():
    shapes = ((12, 7), (3, 7, 5), (3, 7, 2), (3, 2, 5))
    return tuple(normal(shape, seed=i) for i, shape in enumerate(shapes))


def test_biases_are_those_of_a_rows_expert(arrays):
    bias = normal((3, 5), seed=9)
    got = lora_experts(*arrays, SIZES, scaling=SCALING, bias=bias)
    wanted = experts(*arrays, SCALING, np.asarray(SIZES))
    wanted[:4] += bias[0]
    wanted[4:9] += bias[2]
    assert_close(got, wanted)


def test_dora_scales_each_experts_outputs(arrays):
    x, kernel, a, b = arrays
    m = column_norm(kernel, EXPERTS) * (1 + 0.3 * jnp.abs(normal((3, 5), seed=8)))
    bias = normal((3, 5), seed=9)
    options = {"scaling": SCALING}
    got = lora_experts(x, kernel, a, b, SIZES, magnitude=m, bias=bias, **options)
    merged = merge_dora(kernel, a, b, m, contraction=EXPERTS, **options)
    none = 0 * a, 0 * b
    assert_close(got, lora_experts(x, merged, *none, SIZES, bias=bias, **options))


def test_the_kernels_gradient_is_formed_only_where_it_is_wanted(arrays):
    x, kernel = arrays[:2]

    def loss(x, kernel):
        return jnp.sum(jnp.sin(expert_product(0.0, None, x, kernel, SIZES)))

    def shapes(argnums):
        traced = jax.make_jaxpr(jax.grad(loss, argnums))(x, kernel)
        products = ("grouped_dot", "grouped_outer")
        made = [e for e in equations(traced.jaxpr) if e.primitive.name in products]
        return {e.outvars[0].aval.shape for e in made}

    assert (3, 7, 5) not in shapes(0)
    assert (3, 7, 5) in shapes(1)
    got = jax.grad(loss, 1)(x, kernel)
    dy = np.cos(np.asarray(expert_product(0.0, None, x, kernel, SIZES)))
    assert_close(got[0], x[:4].T @ dy[:4])
    assert_close(got[2], x[4:9].T @ dy[4:9])
    assert not got[1].any()


def test_a_factor_read_in_a_stack_has_the_gradient_of_its_own_array(arrays):
    x, kernel = arrays[:2]

    def loss(x, kernel, stack=None):
        return jnp.sum(
            jnp.sin(expert_product(0.0, None, x, kernel, SIZES, None, stack))
        )

    def in_stack(x, kernel):
        stack = jnp.stack([0 * kernel, kernel])
        return loss(x, 7 + kernel, (stack, 1))

    def second_order(loss):  # forward over reverse
        gradient = jax.value_and_grad(loss, (0, 1))
        return jax.jit(lambda *pair: jax.jvp(gradient, pair, pair))(x, kernel)

    jax.tree.map(assert_close, second_order(in_stack), second_order(loss))


@pytest.mark.usefixtures("unchecked")
def test_arrays_that_do_not_fit_are_an_error(arrays):
    x, kernel, a, b = arrays
    wanted = r"\(12, 7\), \(3, 7, 5\), \(2,\).*Sort the rows by expert"
    with pytest.raises(ValueError, match=wanted):
        lora_experts(x, kernel, a, b, SIZES[:2], scaling=1.0)
    with pytest.raises(ValueError, match=r"\(12, 6\), \(3, 7, 5\), \(3,\)"):
        lora_experts(x[:, :6], kernel, a, b, SIZES, scaling=1.0)
    with pytest.raises(ValueError, match=r"\[3, 7, 2\], \[3, 2, 5\].*\(1, 7, 2\)"):
        lora_experts(x, kernel, a[:1], b, SIZES, scaling=1.0)
    with pytest.raises(TypeError, match="sizes must be integers; got float32"):
        lora_experts(x, kernel, a, b, SIZES.astype(jnp.float32), scaling=1.0)
