import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from lora_jax import LoRAConfig
from lora_jax.ops import init_adapter, lora_dense
from tests import reference
from tests.laws import normal
from tests.reference import assert_close

X, KERNEL, A, B = (
    normal(shape, seed)
    for seed, shape in enumerate([(2, 5, 10), (10, 8), (10, 3), (3, 8)])
)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (4,), (2, 3), (2, 1, 2, 2)])
def test_any_leading_dims(leading):
    x = normal((*leading, 10))
    got = lora_dense(x, KERNEL, A, B, scaling=0.7)
    assert_close(got, reference.dense(x, KERNEL, A, B, 0.7))


def test_the_bias_is_added_once():
    bias = normal((8,))
    got = lora_dense(X, KERNEL, A, B, scaling=0.7, bias=bias)
    assert_close(got, reference.dense(X, KERNEL, A, B, 0.7) + np.asarray(bias))


def test_the_input_sets_the_dtype():
    half = lora_dense(X.astype("bfloat16"), KERNEL, A, B, scaling=0.7)
    assert half.dtype == jnp.bfloat16
    full = lora_dense(X, KERNEL.astype("bfloat16"), A, B, scaling=0.7)
    assert full.dtype == jnp.float32


def test_a_step_costs_the_flops_of_the_factored_form():
    """Per token forward, dx, dA and dB: 4 N² + 12 N r, and no dW0 (6 N²)."""
    tokens, n, r = 64, 128, 4
    x, kernel, a, b = (
        jax.ShapeDtypeStruct(s, "float32")
        for s in [(tokens, n), (n, n), (n, r), (r, n)]
    )

    def loss(x, a, b, kernel):
        return jnp.sum(jnp.square(lora_dense(x, kernel, a, b, scaling=2.0)))

    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, a, b, kernel).compile()
    products = tokens * (4 * n * n + 12 * n * r)
    elementwise = 12 * tokens * n
    assert products <= step.cost_analysis()["flops"] <= products + elementwise


def test_w0_is_an_argument_and_not_a_constant():
    jaxpr = jax.make_jaxpr(functools.partial(lora_dense, scaling=0.7))(X, KERNEL, A, B)
    assert not jaxpr.consts


def _first_gradient_norm(rank: int, config: LoRAConfig) -> float:
    x, dy = normal((4, 512), 1), normal((4, 64), 2)
    a, b = init_adapter(jax.random.key(rank), (512, 64), rank)
    kernel, scaling = jnp.zeros((512, 64)), config.scaling_for("layer")
    grad = jax.grad(
        lambda b: jnp.vdot(dy, lora_dense(x, kernel, a, b, scaling=scaling))
    )(b)
    return float(jnp.linalg.norm(grad))


def test_the_first_gradient_does_not_depend_on_rank_under_rslora():
    norms = [
        _first_gradient_norm(r, LoRAConfig(rank=r, alpha=7, rslora=True))
        for r in (16, 64)
    ]
    assert norms[1] / norms[0] == pytest.approx(1, rel=0.15)
    plain = [_first_gradient_norm(r, LoRAConfig(rank=r, alpha=7)) for r in (16, 64)]
    assert plain[1] / plain[0] == pytest.approx(0.5, rel=0.15)


def test_the_first_adam_step_does_not_depend_on_rank_under_alpha_over_rank():
    x, dy = normal((1, 512), 1), normal((1, 64), 2)

    def change(key: jax.Array, rank: int) -> jax.Array:
        a, b = init_adapter(key, (512, 64), rank)
        scaling = LoRAConfig(rank=rank, alpha=7).scaling_for("layer")
        layer = functools.partial(lora_dense, x, jnp.zeros((512, 64)), a)
        grad = jax.grad(lambda b: jnp.vdot(dy, layer(b, scaling=scaling)))(b)
        return jnp.linalg.norm(layer(-1e-3 * jnp.sign(grad), scaling=scaling))

    keys = jax.random.split(jax.random.key(0), 32)
    means = [jax.vmap(lambda k, r=r: change(k, r))(keys).mean() for r in (4, 32)]
    assert means[1] / means[0] == pytest.approx(1, rel=0.15)


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        lora_dense(X, KERNEL, A, B.T, scaling=0.7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"lora_a": A.T, "lora_b": B.T},
            ValueError,
            r"got \(3, 10\), \(8, 3\)\. PyTorch stores these transposed",
        ),
        (
            {"x": X[..., :9]},
            ValueError,
            r"x must be \[\*b, in\] = \[\*b, 10\] for a kernel of shape \(10, 8\); "
            r"got \(2, 5, 9\)",
        ),
        ({"x": jnp.float32(1)}, ValueError, r"got \(\)"),
        (
            {"bias": jnp.ones(1)},
            ValueError,
            r"bias must be \[out\] = \[8\].*got \(1,\)",
        ),
        ({"x": X.astype(int)}, TypeError, "x must be floating-point; got x int32"),
        ({"dropout_rate": 0.1}, ValueError, "dropout_key must be a PRNG key"),
        ({"dropout_rate": 1.1}, ValueError, r"dropout_rate must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"x": X, "kernel": KERNEL, "lora_a": A, "lora_b": B, "scaling": 0.7}
    with pytest.raises(error, match=message):
        lora_dense(**(good | arguments))
