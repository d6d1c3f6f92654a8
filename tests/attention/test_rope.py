"""Rotary position embeddings rotate pairs, and scores depend on distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.attention import rope
from lora_jax.attention.rope import apply_rope, pairs_to_halves, rope_angles
from tests.reference import assert_close

FREQUENCIES = jnp.array([1.0, 0.1, 0.01])


def rotated(x, position):
    angles = rope_angles(jnp.array([[position]]), FREQUENCIES)
    return apply_rope(x, jnp.cos(angles), jnp.sin(angles))


def test_pairs_rotate_like_complex_numbers_and_the_rest_is_unchanged():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
    y = np.asarray(rotated(x, 7))
    z = np.asarray(x[..., :3] + 1j * x[..., 3:6]) * np.exp(7j * np.asarray(FREQUENCIES))
    np.testing.assert_allclose(y[..., :3], z.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[..., 3:6], z.imag, rtol=1e-5, atol=1e-6)
    assert (y[..., 6:] == x[..., 6:]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpus_matmul_rotates_as_slices_do(monkeypatch, dtype):
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8), dtype)

    def both(x):
        y, back = jax.vjp(lambda x: rotated(x, 7), x)
        return y, *back(jnp.cos(x))

    wanted = jax.jit(lambda x: both(x))(x)
    monkeypatch.setattr(rope, "target_platform", lambda: "tpu")
    for got, plain in zip(jax.jit(lambda x: both(x))(x), wanted, strict=True):
        assert_close(got, plain, dtype)


def test_reordered_heads_rotate_neighbouring_dimensions():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 7))
    y = np.asarray(rotated(pairs_to_halves(x, 3), 7))
    z = np.asarray(x[..., :6:2] + 1j * x[..., 1:6:2])
    z = z * np.exp(7j * np.asarray(FREQUENCIES))
    np.testing.assert_allclose(y[..., :3], z.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[..., 3:6], z.imag, rtol=1e-5, atol=1e-6)
    assert (y[..., 6:] == x[..., 6:]).all()


def test_scores_depend_only_on_distance():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 6))
    near = (rotated(q, 5) * rotated(k, 2)).sum()
    far = (rotated(q, 105) * rotated(k, 102)).sum()
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - (rotated(q, 5) * rotated(k, 3)).sum()) > 1e-3


def test_second_derivatives_are_those_of_the_rotation():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
    matrix = jax.jacrev(lambda x: rotated(x[None, None, None], 7).ravel())(x[0, 0, 0])

    def product(rotate, over):
        gradient = jax.grad(lambda x: jnp.sum(jnp.tanh(rotate(x))))
        return over(gradient, x)

    def forward(gradient, x):
        return jax.jvp(gradient, (x,), (x,))[1]

    def reverse(gradient, x):
        return jax.vjp(gradient, x)[1](x)[0]

    wanted = product(lambda x: x @ matrix.T, forward)
    for over in (forward, reverse):
        assert_close(product(lambda x: rotated(x, 7), over), wanted, "float32")


def test_more_angles_than_half_a_head_are_an_error():
    with pytest.raises(ValueError, match=r"at most h / 2 = 2 angles .* got 3"):
        rotated(jnp.ones((1, 1, 1, 4)), 1)
