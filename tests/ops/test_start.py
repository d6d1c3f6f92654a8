"""Starts from W0 against the papers' formulas in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops.contraction import DENSE, Contraction
from lora_jax.ops.conv import conv_contraction
from lora_jax.ops.einsum import parse_equation
from lora_jax.ops.factors import Factors
from lora_jax.ops.low_rank import as_matrices
from lora_jax.ops.merge import add_delta, delta_kernel
from lora_jax.ops.start import gradient_factors, init_factors
from tests.laws import normal
from tests.reference import assert_close

S, RANK = 7 / 4, 2
KERNELS = {
    "dense": ((9, 7), DENSE),
    "heads": ((9, 2, 4), Contraction(inputs=(0,), outputs=(1, 2))),
    "experts": ((3, 7, 6), parse_equation("ebi,eio->ebo", 3).contraction),
    "groups": ((3, 2, 6), conv_contraction(1, groups=2)),
}
by_kernel = pytest.mark.parametrize("name", KERNELS)


def start(name: str, init: str):
    shape, contraction = KERNELS[name]
    kernel = normal(shape, seed=5)
    options = {"scaling": S, "contraction": contraction}
    factors = init_factors(jax.random.key(0), kernel, RANK, init=init, **options)
    matrix = as_matrices(kernel, contraction)
    product = as_matrices(
        delta_kernel(factors.lora_a, factors.lora_b, shape, **options), contraction
    )
    return kernel, factors, options, matrix, product


@by_kernel
def test_pissa_is_the_best_approximation_of_w0(name):
    *_, matrix, product = start(name, "pissa")
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    wanted = (u[..., :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :]
    assert_close(product, wanted)


def test_pissa_shares_the_singular_values_evenly():
    _, factors, _, matrix, _ = start("dense", "pissa")
    s = np.linalg.svd(matrix, compute_uv=False)[:RANK]
    assert_close(jnp.linalg.norm(factors.lora_a, axis=0) ** 2, s / S)
    assert_close(jnp.linalg.norm(factors.lora_b, axis=1) ** 2, s / S)


@by_kernel
def test_randomized_pissa_finds_the_same_product(name):
    *_, exact = start(name, "pissa")
    *_, product = start(name, "pissa_niter_16")
    assert_close(product, exact)


@by_kernel
def test_olora_takes_the_first_rows_of_r_and_columns_of_q(name):
    _, factors, _, matrix, product = start(name, "olora")
    q, r = np.linalg.qr(matrix.swapaxes(-1, -2))  # W0ᵀ = Q R
    wanted = (q[..., :RANK] @ r[..., :RANK, :]).swapaxes(-1, -2)
    assert_close(product, S * wanted)
    rows = np.asarray(factors.lora_b).reshape(*matrix.shape[:-2], RANK, -1)
    gram = rows @ rows.swapaxes(-1, -2)
    np.testing.assert_allclose(gram - np.eye(RANK), 0, atol=1e-6)


def test_lora_ga_takes_other_singular_vectors_for_b_than_for_a():
    shape, contraction = KERNELS["groups"]
    gradient, r = normal(shape, seed=5), 1
    a, b = gradient_factors(gradient, r, contraction=contraction, gamma=9.0)
    matrix = as_matrices(gradient, contraction)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    c = matrix.shape[-1] ** 0.25 / 3
    # Singular vectors have no sign of their own.
    assert_close(abs(a.reshape(*matrix.shape[:-1], r)), abs(c * u[..., :1]))
    b = b.reshape(*matrix.shape[:-2], r, -1)
    assert_close(abs(b), abs(c * vt[..., 1:2, :]))


def test_an_orthogonal_start_is_silent_with_a_and_b_drawn():
    _, factors, *_, product = start("groups", "orthogonal")
    np.testing.assert_allclose(product, 0, atol=1e-7)
    assert factors.start_a is None
    for factor in factors[:2]:
        assert 0.05 < np.std(factor) < 0.15  # a tenth of a normal's


@pytest.mark.parametrize("name", ["heads", "groups"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_update_is_what_was_added_since_the_start(name, init):
    kernel, factors, options, matrix, product = start(name, init)
    silent = add_delta(kernel, *factors.plain(options["contraction"])[:2], **options)
    assert_close(silent, kernel)
    moved = factors._replace(lora_a=factors.lora_a + 0.1, lora_b=factors.lora_b - 0.2)
    merged = add_delta(kernel, *moved.plain(options["contraction"])[:2], **options)
    own = delta_kernel(moved.lora_a, moved.lora_b, kernel.shape, **options)
    wanted = matrix - product + as_matrices(own, options["contraction"])
    assert_close(as_matrices(merged, options["contraction"]), wanted)
    assert isinstance(moved, Factors)


def test_a_start_that_does_not_suit_the_layer_is_refused():
    key, kernel = jax.random.key(0), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"rank must be from 1 to 3.*\(4, 3\).*got 4"):
        init_factors(key, kernel, 4, init="pissa")
    with pytest.raises(ValueError, match=r"rank must be from 1 to 3.*got 4"):
        gradient_factors(kernel, 2)
    with pytest.raises(ValueError, match=r"rank must be even.*got 3"):
        init_factors(key, kernel, 3, init="orthogonal")
    with pytest.raises(ValueError, match=r"for an embedding.*got 'orthogonal'"):
        init_factors(key, kernel, 2, init="orthogonal", one_hot=True)
