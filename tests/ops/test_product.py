import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import lora_conv, lora_dense, lora_einsum, lora_embed
from lora_jax.ops import product as ops
from lora_jax.ops.product import (
    check_dropout,
    check_floating,
    dropout,
    factor_product,
    low_rank_update,
)
from tests.laws import equations, normal
from tests.reference import assert_close


@pytest.mark.parametrize(
    ("equation", "x", "factor"),
    [
        ("bi,iR->bR", (4, 5), (5, 2)),
        ("bR,Ro->bo", (4, 2), (2, 5)),
        ("ebi,eiR->ebR", (3, 4, 5), (3, 5, 2)),
        ("bnhd,nhR->bdR", (2, 3, 4, 5), (3, 4, 2)),
        ("bR,vR->bv", (4, 2), (5, 2)),
    ],
)
def test_the_vjp_is_the_derivative(equation, x, factor):
    ours = functools.partial(factor_product, equation, 0.0, None)
    plain = functools.partial(jnp.einsum, equation)
    x, factor = normal(x), normal(factor, 1)
    dy = normal(plain(x, factor).shape, 2)
    with jax.enable_x64(True):
        args = [array.astype("float64") for array in (x, factor, dy)]
        got, wanted = (
            jax.jit(lambda x, factor, dy, f=f: jax.vjp(f, x, factor)[1](dy))(*args)
            for f in (ours, plain)
        )
        jax.tree.map(functools.partial(assert_close, dtype="float64"), got, wanted)


def test_forward_mode_raises_a_clear_error():
    x, factor = normal((4, 5)), normal((5, 2))
    f = functools.partial(factor_product, "bi,iR->bR", 0.0, None, x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (factor,), (factor,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(f)(factor)


def test_the_hessian_matches_plain_products():
    arrays = normal((4, 5)), normal((5, 2), 1), normal((2, 3), 2)

    def ours(x, a, b):
        update = low_rank_update("bi,iR->bR", "bR,Ro->bo", x, a, b, scaling=1.5)
        return jnp.sum(jnp.tanh(update))

    def plain(x, a, b):
        return jnp.sum(jnp.tanh(1.5 * (x @ a) @ b))

    with jax.enable_x64(True):
        wide = [array.astype("float64") for array in arrays]
        got, want = (jax.jit(jax.hessian(f, (1, 2)))(*wide) for f in (ours, plain))
        jax.tree.map(functools.partial(assert_close, dtype="float64"), got, want)


def largest_moved(hlo):
    """Elements of the largest array that is copied or transposed."""
    moved = re.findall(r"= f32\[([\d,]*)\]\S* (?:transpose|copy)\(", hlo)
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in moved]
    return max(sizes, default=0)


@pytest.mark.parametrize("labels", ["bt", "tb", "zy"])
def test_the_wide_operand_is_never_transposed(labels):
    """Neither x nor dy may be copied to, or multiplied as, its transpose.

    Whatever the labels are: `jnp.einsum` sums in the order of the alphabet.
    """
    down, up = f"{labels}i,iR->{labels}R", f"{labels}R,Ro->{labels}o"
    x, a, b, dy = normal((4, 64, 96)), normal((96, 3)), normal((3, 80)), (4, 64, 80)

    def loss(x, a, b):
        update = low_rank_update(down, up, x, a, b, scaling=1.0)
        return jnp.vdot(update, normal(dy, 1))

    hlo = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, a, b).compile().as_text()
    assert largest_moved(hlo) < 4 * 64 * 80
    assert re.search(r"= f32\[3,96\]\S* dot\(", hlo)  # u^T x
    assert not re.search(r"= f32\[96,3\]\S* dot\(", hlo)  # x^T u


def test_heads_are_contracted_in_memory_order():
    """The labels ``n``, ``h`` are not in alphabetical order."""
    x, a, b = normal((4, 64, 96)), normal((96, 3)), normal((3, 5, 16))

    def loss(x, a, b):
        update = low_rank_update("bti,iR->btR", "btR,Rnh->btnh", x, a, b, scaling=1.0)
        return jnp.sum(update**2)

    hlo = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, a, b).compile().as_text()
    assert largest_moved(hlo) < 4 * 64 * 80


def test_the_gradient_of_a_traced_scaling_is_correct():
    x, a, b = normal((4, 5)), normal((5, 2), 1), normal((2, 3), 2)

    def loss(scaling):
        args = ("bi,iR->bR", "bR,Ro->bo", x, a, b)
        return jnp.sum(low_rank_update(*args, scaling=scaling))

    assert_close(jax.grad(loss)(jnp.float32(0.5)), np.sum(np.asarray((x @ a) @ b)))


ONE = jnp.ones((1, 1))
ZERO = jnp.zeros((1, 1))  # a kernel: the output is the update
LAYERS = {
    "dense": lambda x, s: lora_dense(x, ZERO, ONE, ONE, **s),
    "einsum": lambda x, s: lora_einsum("bi,io->bo", x, ZERO, ONE, ONE, **s),
    "hidden": lambda x, s: lora_dense(x, ZERO, ONE, ONE, hidden=x, **s),
    "conv": lambda x, s: lora_conv(x[None], ZERO[None], ONE[None], ONE, **s),
    "embed": lambda x, s: lora_embed(
        jnp.arange(len(x)), 0 * x, x.astype("float32"), ONE, **s
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_scaling_is_not_rounded_to_the_dtype_of_the_computation(layer, dtype):
    x = jnp.arange(128.0, 256)[:, None].astype(dtype)
    want = (x.astype("float32") * np.float32(4 / 3)).astype(dtype)
    got = LAYERS[layer](x, {"scaling": 4 / 3})
    np.testing.assert_array_equal(got.ravel(), want.ravel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_divides_by_what_it_keeps_and_rounds_once(dtype, key):
    x = jnp.arange(128.0, 256).astype(dtype)
    got = dropout(x, 0.1, key)
    want = (x.astype("float32") / np.float32(0.9)).astype(dtype)
    np.testing.assert_array_equal(got, jnp.where(got == 0, 0, want))
    assert got.any()


def test_gradients_of_float32_factors_accumulate_in_float32():
    x = jnp.ones((4096, 1), jnp.bfloat16)
    grad = jax.grad(
        lambda a: jnp.sum(
            factor_product("bi,iR->bR", 0.0, None, x, a).astype("float32")
        )
    )(jnp.ones((1, 1)))
    assert grad.dtype == jnp.float32
    assert grad.item() == 4096


@pytest.mark.parametrize("columns", [8, 64])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 5), (1, 5), (8, 1), (4, 32)])
def test_a_bfloat16_gradient_of_any_size_compiles_and_runs(leading, columns):
    """XLA:CPU rejects some products of bfloat16 to float32, depending on shape."""
    x = normal((*leading, columns)).astype("bfloat16")
    a, b, dy = normal((columns, 3), 1), normal((3, 8), 2), normal((*leading, 8), 3)
    letters = "tu"[: len(leading)]
    equations = (f"{letters}i,iR->{letters}R", f"{letters}R,Ro->{letters}o")

    def loss(factors, x, update):
        return jnp.sum(dy * update(*equations, x, *factors))

    ours = functools.partial(
        loss, update=functools.partial(low_rank_update, scaling=2.0)
    )

    def plain(factors, x):
        return jnp.sum(dy * (2 * (x @ factors[0]) @ factors[1]))

    got = jax.jit(jax.grad(ours))((a, b), x)
    want = jax.jit(jax.grad(plain))((a, b), x.astype("float32"))
    for ours_of, plain_of in zip(got, want, strict=True):
        assert ours_of.dtype == jnp.float32
        assert_close(ours_of, plain_of, "bfloat16")


def test_dropout_keeps_the_mean_and_drops_at_its_rate(key):
    dropped = np.asarray(dropout(jnp.ones((200, 200)), 0.25, key))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert len({row.tobytes() for row in dropped}) == 200  # each token its own mask


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_not_a_probability_is_an_error(rate, key):
    with pytest.raises(
        ValueError, match=rf"dropout_rate must be in \[0, 1\]; got {rate}"
    ):
        check_dropout(rate, key)


def test_a_key_is_required_only_if_dropout_is_active(key):
    assert check_dropout(0.0, None) is None
    assert check_dropout(1.0, key) is None
    assert check_dropout(0.5, key) is key
    with pytest.raises(ValueError, match=r"got None with dropout_rate=0\.5\. Pass"):
        check_dropout(0.5, None)


def test_every_integer_array_is_listed():
    ints = jnp.ones(2, jnp.int32)
    message = r"x, kernel must be floating-point; got x int32, kernel int32\. Convert"
    with pytest.raises(TypeError, match=message):
        check_floating(x=ints, kernel=ints, lora_a=jnp.ones(2), bias=None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 20), (20, 2), (17, 17)])
def test_batched_gradients_agree_with_and_without_the_barrier(rows, columns, dtype):
    """Below 16 rows or columns there is none; 17 have it."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (4, rows, columns), dtype)
    a = jax.random.normal(keys[1], (4, columns, 2))

    def loss(product):
        return lambda a: jnp.sum(jnp.sin(product(x, a)).astype(jnp.float32))

    ours = loss(lambda x, a: factor_product("eti,eiR->etR", 0.0, None, x, a))
    plain = loss(lambda x, a: jnp.einsum("eti,eir->etr", x, a.astype(x.dtype)))
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    got, wanted = (jax.jit(jax.grad(f))(a) for f in (ours, plain))
    assert got.dtype == jnp.float32
    scale = jnp.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * scale)


def test_a_factor_that_is_not_trained_keeps_no_input():
    x, w0, a, b = (normal(s) for s in [(32, 10), (10, 8), (10, 3), (3, 8)])

    def of_b(b):
        return lora_dense(x, w0, a, b, scaling=2.0)

    y, backward = jax.vjp(of_b, b)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size]
    assert kept == [(32, 3)]  # x A alone
    dy = normal(y.shape, seed=1)
    assert_close(backward(dy)[0], 2.0 * (x @ a).T @ dy)


def test_a_tpu_adds_a_thin_update_without_a_matmul(monkeypatch):
    arrays = normal((2, 3, 4)), normal((4, 2), 1), normal((2, 5, 3), 2)

    def update(x, a, b, **options):
        down, up = "bti,iR->btR", "btR,Rnh->btnh"
        return low_rank_update(down, up, x, a, b, scaling=1.5, **options)

    def both(*arrays):
        y, back = jax.vjp(update, *arrays)
        return y, *back(jnp.cos(arrays[0][..., :1, None] * jnp.ones((5, 3))))

    def matmuls(function=update, **options):
        jaxpr = jax.make_jaxpr(lambda *arrays: function(*arrays, **options))(*arrays)
        return str(jaxpr).count("dot_general")

    def gradient(x, **options):
        return jax.grad(lambda x: update(x, *arrays[1:], **options).sum())(x)

    wanted = both(*arrays)
    monkeypatch.setattr(ops, "target_platform", lambda: "tpu")
    assert matmuls() == 2  # small
    monkeypatch.setattr(ops, "MIN_VECTOR_BYTES", 0)
    assert matmuls() == 1
    assert matmuls(is_rescaled=True) == 2
    assert matmuls(lambda x, a, b: gradient(x)) == 2  # x A and the gradient of h
    rate = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    assert matmuls(lambda x, a, b: gradient(x, **rate)) == 3
    for got, plain in zip(both(*arrays), wanted, strict=True):
        assert_close(got, plain)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "target_device", lambda: "TPU v6 lite")
        assert matmuls() == 2
    monkeypatch.setattr(ops, "MAX_VECTOR_RANK", 1)
    assert matmuls() == 2


def test_on_a_gpu_thin_products_share_no_operand_with_the_bases(monkeypatch):
    x, w, a, b = (
        normal(shape, seed=i)
        for i, shape in enumerate([(5, 3), (3, 7), (3, 2), (2, 7)])
    )

    def loss(x, factors):
        y = x @ w + low_rank_update("ti,iR->tR", "tR,Ro->to", x, *factors, scaling=1.5)
        return jnp.sum(jnp.sin(y))

    def gradients(x):
        return jax.grad(loss, (0, 1))(x, (a, b))

    def results():
        each = jax.vmap(lambda row: gradients(row[None]))(x)
        return gradients(x), each, jax.jvp(gradients, (x,), (jnp.ones_like(x),))

    wanted = results()
    monkeypatch.setattr(ops, "target_platform", lambda: "gpu")
    jax.tree.map(assert_close, results(), wanted)
    found = list(equations(jax.make_jaxpr(gradients)(x).jaxpr))
    bases = [e for e in found if w.shape in [v.aval.shape for v in e.invars]]
    read = [operand for e in bases for operand in e.invars]
    barriers = [e for e in found if e.primitive.name == "optimization_barrier"]
    assert [e.invars[0].aval.shape for e in barriers] == [x.shape, (5, 7)]
    assert all(e.invars[0] in read for e in barriers)
