"""DoRA's arithmetic: factored norms, no change at init, a gradient with constant n."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lora_jax.names import LINEAR, X_A
from lora_jax.ops import DENSE, Contraction, column_norm, lora_dense, merge_dora
from lora_jax.ops.dora import adapted_norm, dora_scale, rescale
from tests import reference
from tests.laws import RANK, SCALING, equations, normal
from tests.reference import TOLERANCE, assert_close


def dora_dense(x, kernel, lora_a, lora_b, magnitude, **options):
    return lora_dense(x, kernel, lora_a, lora_b, magnitude=magnitude, **options)


# Kernel, contraction, how A and B multiply; three experts and heads: as many as ranks.
LAYOUTS = {
    "dense": ((10, 8), DENSE, "ir,ro->io"),
    "transposed": ((9, 7), Contraction((), (1,), (0,)), "ir,ro->oi"),
    "heads_in": ((10, 3, 5), Contraction((), (0,), (1, 2)), "dr,rnh->dnh"),
    "heads_out": ((3, 5, 10), Contraction((), (0, 1), (2,)), "nhr,rd->nhd"),
    "experts": ((3, 7, 5), Contraction((0,), (1,), (2,)), "eir,ero->eio"),
    "experts_last": ((5, 7, 3), Contraction((2,), (1,), (0,)), "eir,ero->oie"),
    "conv": ((3, 2, 4, 6), Contraction((), (0, 1, 2), (3,)), "xyir,ro->xyio"),
    "groups": ((3, 2, 10), Contraction((), (0, 1), (2,), 2), "gxir,gro->xigo"),
    "scanned_groups": (
        *((3, 4, 2, 10), Contraction((1,), (0, 2), (3,), 2)),
        "lgxir,lgro->xligo",
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def arrays_of(layout: str, dtype: str = "float32"):
    shape, contraction, _ = LAYOUTS[layout]
    a, b = contraction.factor_shapes(shape, RANK)
    return normal(shape, 1).astype(dtype), normal(a, 2), normal(b, 3)


def in_kernel_order(magnitude, contraction: Contraction):
    """Moves the axes of ``[*batch, *out]`` to where the kernel has them."""
    axes = (*contraction.batch, *contraction.outputs)
    return np.transpose(magnitude, np.argsort(axes))


def merged(layout: str, kernel, a, b, magnitude):
    _, contraction, factors = LAYOUTS[layout]
    m = in_kernel_order(magnitude, contraction)
    inputs = contraction.inputs
    return reference.dora_merge(kernel, a, b, m, SCALING, factors, inputs)


@layouts
def test_the_norms_match_the_merged_kernel(layout):
    _, contraction, factors = LAYOUTS[layout]
    arrays = arrays_of(layout)
    got = adapted_norm(*arrays, scaling=SCALING, contraction=contraction)
    whole = reference.merge(*arrays, SCALING, factors)
    wanted = np.sqrt(np.square(whole).sum(axis=contraction.inputs))
    assert_close(in_kernel_order(got, contraction), wanted)
    half = arrays_of(layout, "bfloat16")
    got = adapted_norm(*half, scaling=SCALING, contraction=contraction)
    assert got.dtype == jnp.float32
    whole = reference.merge(*half, SCALING, factors)
    wanted = np.sqrt(np.square(whole).sum(axis=contraction.inputs))
    assert_close(in_kernel_order(got, contraction), wanted, "bfloat16")


def test_the_factored_norms_are_exact():
    with jax.enable_x64(True):
        kernel, a, b = (jnp.asarray(x, "float64") for x in arrays_of("dense"))
        got = adapted_norm(kernel, a, b, scaling=SCALING)
        wanted = np.linalg.norm(reference.merge(kernel, a, b, SCALING), axis=0)
        np.testing.assert_allclose(got, wanted, rtol=1e-14)


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_is_exactly_1_at_init_under_jit_scan_and_vmap(layout, dtype):
    _, contraction, _ = LAYOUTS[layout]
    kernel, a, b = arrays_of(layout, dtype)
    scale = functools.partial(dora_scale, scaling=SCALING, contraction=contraction)
    magnitude = column_norm(kernel, contraction)
    fresh = (kernel, a, 0 * b, magnitude)
    assert (jax.jit(scale)(*fresh) == 1).all()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (kernel, a, 0 * b))
    norms = jnp.stack([column_norm(k, contraction) for k in stacked[0]])
    stacked = (*stacked, norms)
    assert (jax.jit(jax.vmap(scale))(*stacked) == 1).all()

    @jax.jit
    def scan(xs):
        return jax.lax.scan(lambda c, x: (c, scale(*x)), 0, xs)[1]

    assert (scan(stacked) == 1).all()


@layouts
def test_merging_scales_and_rounds_once(layout):
    _, contraction, _ = LAYOUTS[layout]
    kernel, a, b = arrays_of(layout)
    magnitude = 1 + jnp.abs(column_norm(kernel, contraction))
    merge = functools.partial(merge_dora, scaling=SCALING, contraction=contraction)
    got = merge(kernel, a, b, magnitude)
    assert_close(got, merged(layout, kernel, a, b, magnitude))
    half = merge(kernel.astype("bfloat16"), a, b, magnitude)
    assert half.dtype == jnp.bfloat16
    assert_close(half, got, "bfloat16")
    fresh = merge(kernel, a, 0 * b, column_norm(kernel, contraction))
    np.testing.assert_array_equal(fresh, kernel)


def dense_arrays(dtype: str = "float32"):
    kernel, a, b = arrays_of("dense", dtype)
    magnitude = 0.5 + jnp.abs(normal((8,), 4))
    x, bias = normal((2, 5, 10), 5).astype(dtype), 3 * normal((8,), 6).astype(dtype)
    return (x, kernel, a, b, magnitude), bias


def oracle(x, kernel, a, b, magnitude, bias):
    """The layer with the merged kernel."""
    x = np.asarray(x, np.float64)
    return x @ merged("dense", kernel, a, b, magnitude) + np.asarray(bias, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_equals_the_layer_with_the_merged_kernel(dtype):
    arrays, bias = dense_arrays(dtype)
    got = jax.jit(functools.partial(dora_dense, scaling=SCALING))(*arrays, bias=bias)
    assert got.dtype == dtype
    assert_close(got, oracle(*arrays, bias), dtype)


def test_the_gradient_holds_the_norms_constant():
    arrays, bias = dense_arrays()
    weights = normal((2, 5, 8), 7)

    def loss(*arrays):
        y = dora_dense(*arrays[:5], scaling=SCALING, bias=arrays[5])
        return jnp.sum(weights * y)

    grads = jax.jit(jax.grad(loss, argnums=(0, 2, 3, 4, 5)))(*arrays, bias)
    # With n constant the output is linear in each argument: slopes are exact.
    norms = np.linalg.norm(reference.merge(*arrays[1:4], SCALING), axis=0)

    def at(x, a, b, magnitude, bias):
        kernel = reference.merge(arrays[1], a, b, SCALING)
        y = magnitude / norms * (np.asarray(x, np.float64) @ kernel) + bias
        return float(np.sum(weights * y))

    point = [np.asarray(v, np.float64) for v in (arrays[0], *arrays[2:], bias)]
    generator = np.random.default_rng(0)
    for i, gradient in enumerate(grads):
        assert np.any(gradient)
        for _ in range(3):
            direction = generator.normal(size=gradient.shape)
            ends = direction, 0 * direction
            one, zero = (at(*point[:i], end, *point[i + 1 :]) for end in ends)
            bound = np.linalg.norm(gradient) * np.linalg.norm(direction)
            error = np.sum(gradient * direction) - (one - zero)
            assert abs(error) <= TOLERANCE["float32"] * bound


def test_at_init_a_has_no_gradient_and_b_and_m_have():
    (x, kernel, a, b, _), _ = dense_arrays()

    def loss(a, b, m):
        return jnp.square(dora_dense(x, kernel, a, b, m, scaling=SCALING)).sum()

    da, db, dm = jax.grad(loss, argnums=(0, 1, 2))(a, 0 * b, column_norm(kernel))
    assert not np.any(da)
    assert np.all(db != 0)
    assert np.all(dm != 0)


def test_no_product_of_the_kernels_shape_is_formed():
    """Forms neither A B nor a gradient of W0, forward or backward."""
    (x, kernel, a, b, m), bias = dense_arrays()

    def loss(x, a, b, m):
        return dora_dense(x, kernel, a, b, m, scaling=SCALING, bias=bias).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, a, b, m)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    shapes = [sorted(e.outvars[0].aval.shape) for e in products]
    assert shapes
    assert sorted(kernel.shape) not in shapes


def test_a_column_of_zeros_stays_finite_and_unchanged():
    (x, kernel, a, b, _), bias = dense_arrays()
    kernel = kernel.at[:, 2].set(0)
    magnitude = column_norm(kernel)

    def layer(b, m):
        return dora_dense(x, kernel, a, b, m, scaling=SCALING, bias=bias)

    np.testing.assert_array_equal(layer(0 * b, magnitude), x @ kernel + bias)
    grads = jax.grad(lambda *args: layer(*args).sum(), argnums=(0, 1))(0 * b, magnitude)
    assert all(np.isfinite(g).all() for g in grads)


def test_rescaling_keeps_a_scale_of_1_and_a_large_bias_exact():
    y = normal((4, 8), 1).astype("bfloat16")
    bias = 100 * normal((8,), 2).astype("bfloat16")
    np.testing.assert_array_equal(rescale(y + bias, jnp.ones(8), bias), y + bias)
    scale = 1 + 1e-3 * normal((8,), 3)
    wide = np.asarray((y + bias), np.float64)
    b, s = np.asarray(bias, np.float64), np.asarray(scale, np.float64)
    wanted = s * (wide - b) + b
    got = np.asarray(rescale(y + bias, scale, bias), np.float64)
    assert np.all(np.abs(got - wanted) <= 2**-8 * np.abs(wanted))  # one rounding


def test_the_backward_pass_keeps_the_output_once_in_its_own_dtype():
    y, scale = normal((64, 8)).astype("bfloat16"), 1 + 0.1 * normal((8,), 1)
    pull = jax.jit(lambda *args: jax.vjp(rescale, *args)[1])(y, scale)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= y.size]
    assert [leaf.dtype for leaf in wide] == [jnp.bfloat16]


def test_dropout_acts_only_on_the_update():
    arrays, bias = dense_arrays()
    run = functools.partial(dora_dense, *arrays, scaling=SCALING, bias=bias)
    x, kernel = np.asarray(arrays[0], np.float64), arrays[1]
    norms = np.linalg.norm(reference.merge(*arrays[1:4], SCALING), axis=0)
    base = x @ np.asarray(kernel, np.float64) * (arrays[4] / norms) + bias
    assert_close(run(dropout_rate=1.0, dropout_key=jax.random.key(0)), base)
    one, other = (
        run(dropout_rate=0.5, dropout_key=jax.random.key(seed)) for seed in (0, 1)
    )
    assert not np.allclose(one, other)


@pytest.mark.usefixtures("unchecked")
def test_a_magnitude_of_the_wrong_shape_is_rejected():
    (x, kernel, a, b, _), _ = dense_arrays()
    message = r"magnitude must be \[\*batch, \*out\] = \[8\] .*\(10, 8\); got \(10,\)"
    with pytest.raises(ValueError, match=message):
        dora_dense(x, kernel, a, b, jnp.ones(10), scaling=SCALING)
    with pytest.raises(TypeError, match=r"must be floating-point; got magnitude int32"):
        dora_dense(x, kernel, a, b, jnp.ones(8, "int32"), scaling=SCALING)


def test_saving_outputs_computes_no_layer_again_in_the_backward_pass():
    x, w0, a, b, m = (normal(s) for s in [(9, 5), (5, 7), (5, 2), (2, 7), (7,)])
    policy = jax.checkpoint_policies.save_only_these_names(X_A, LINEAR)

    def loss(factors):
        a, b, m = factors
        y = lora_dense(x, w0, a, b, magnitude=m, scaling=1.5)
        return jnp.sum(jnp.sin(checkpoint_name(y, LINEAR)))

    saving = jax.checkpoint(loss, policy=policy)
    text = jax.jit(jax.grad(saving)).lower((a, b, m)).compile().as_text()
    products = re.findall(r"f32\[(\S*)\]\S* dot\(", text)
    plain = jax.jit(jax.grad(loss)).lower((a, b, m)).compile().as_text()
    assert products
    assert products == re.findall(r"f32\[(\S*)\]\S* dot\(", plain)
