"""The laws of LoRA, each a function of one case.

A case is anything that calls itself LoRA: a pure function (`tests.cases.OP_CASES`), or
a Flax module, where ``init`` makes its arrays and ``apply`` binds them. To hold a new
member to the laws, describe it as a `Case` and write::

    @pytest.mark.parametrize(("law", "case"), trials(MY_CASES))
    def test_law(law, case, key):
        law(case, key)
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TOLERANCE, assert_close

RANK, ALPHA = 3, 7.0
SCALING = ALPHA / RANK
PRODUCTS = ("dot_general", "conv_general_dilated", "scatter-add", "scatter")


class Arrays(NamedTuple):
    """The arguments of one layer; ``lora_b`` is zero as `Case.init` makes it."""

    x: jax.Array
    kernel: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array


class Case(NamedTuple):
    """One member that claims to be LoRA.

    Attributes:
      name: shown in the test's id.
      init: ``init(key) -> Arrays``, float32, fresh (B = 0), of rank `RANK`.
      apply: ``apply(x, kernel, lora_a, lora_b, scaling, **dropout) -> y``.
      base: ``base(x, kernel) -> y``: the plain layer, somebody else's code.
      merge: ``merge(kernel, lora_a, lora_b, scaling) -> kernel``.
      reference: as ``apply``, in NumPy float64.
      matrices: ``matrices(kernel) -> [n, in, out]``, one for each expert or group.
      fan_in: of one matrix; 1 where the input is one-hot.
      trainable: elements of A and B together, counted by hand.
      dropout: whether ``apply`` takes ``dropout_rate`` and ``dropout_key``.
    """

    name: str
    init: Callable[..., Arrays]
    apply: Callable[..., jax.Array]
    base: Callable[..., jax.Array]
    merge: Callable[..., jax.Array]
    reference: Callable[..., np.ndarray]
    matrices: Callable[[np.ndarray], np.ndarray]
    fan_in: int
    trainable: int
    dropout: bool = True


def tuned(case: Case, key: jax.Array) -> Arrays:
    """Returns the case's arrays with a B that is not zero."""
    arrays = case.init(key)
    b = jax.random.normal(jax.random.fold_in(key, 99), arrays.lora_b.shape)
    return arrays._replace(lora_b=b)


def is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def cast_base(arrays: Arrays, dtype: str) -> Arrays:
    """Casts the input and the kernel; A and B stay float32."""
    x = arrays.x.astype(dtype) if is_float(arrays.x) else arrays.x
    return arrays._replace(x=x, kernel=arrays.kernel.astype(dtype))


def loss_and_gradients(case: Case, arrays: Arrays, key: jax.Array):
    """Returns random weights w of y's shape, and the gradients of ``sum(w * y)``.

    W0 is not differentiated, nor are integer inputs: their gradient is None.
    """
    out = jax.eval_shape(lambda arrays: case.apply(*arrays, SCALING), arrays)
    weights = jax.random.normal(key, out.shape)
    names = ["lora_a", "lora_b"] + ["x"] * is_float(arrays.x)

    def loss(trainable):
        y = case.apply(*arrays._replace(**trainable), SCALING)
        return jnp.sum(weights * y)

    grads = jax.grad(loss)({name: getattr(arrays, name) for name in names})
    return weights, Arrays(grads.get("x"), None, grads["lora_a"], grads["lora_b"])


def equations(jaxpr) -> Iterator:
    """Yields every equation of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# --- Algebra


def check_silent_at_init(case: Case, key: jax.Array) -> None:
    """Law 1: with B = 0 the output is the base's bit for bit; with another B not."""
    for dtype in ("float32", "bfloat16"):
        arrays = cast_base(case.init(key), dtype)
        assert arrays.lora_a.any()
        for transform in (lambda f: f, jax.jit):
            base = transform(case.base)(arrays.x, arrays.kernel)
            apply = transform(functools.partial(case.apply, scaling=SCALING))
            got = apply(*arrays)
            assert got.dtype == base.dtype == dtype
            assert np.array_equal(np.asarray(got), np.asarray(base))
            changed = arrays._replace(lora_b=arrays.lora_b + 1)
            assert not np.array_equal(np.asarray(apply(*changed)), np.asarray(base))


def check_first_gradient(case: Case, key: jax.Array) -> None:
    """Law 2: at B = 0, dA = 0 and dB is not."""
    _, grads = loss_and_gradients(case, case.init(key), key)
    assert not grads.lora_a.any()
    assert (grads.lora_b != 0).mean() > 0.9


def check_variance_of_a(case: Case, key: jax.Array) -> None:
    """Law 3: A ~ U(±1/√fan_in), std·√fan_in = 0.577, whatever the shape."""
    draw = jax.jit(lambda k: case.init(k).lora_a)
    draws = np.stack([np.asarray(draw(k)) for k in jax.random.split(key, 40)])
    bound = case.fan_in**-0.5
    assert 0.97 * bound < np.abs(draws).max() <= bound
    np.testing.assert_allclose(draws.std() / bound, 3**-0.5, rtol=0.05)
    assert len(np.unique(draws[0])) > 0.99 * draws[0].size  # no expert copies another


def check_contraction(case: Case, key: jax.Array) -> None:
    """Laws 4, 6: the layer is the base with the merged kernel, and NumPy agrees."""
    arrays = tuned(case, key)
    got = case.apply(*arrays, SCALING)
    assert_close(got, case.reference(*arrays, SCALING))
    assert_close(case.base(arrays.x, case.merge(*arrays[1:], SCALING)), got)


def check_rank(case: Case, key: jax.Array) -> None:
    """Law 4: the rank of each matrix of the change is that of its factors."""
    arrays = tuned(case, key)
    delta = case.merge(jnp.zeros_like(arrays.kernel), *arrays[2:], 1.0)
    matrices = case.matrices(np.asarray(delta))
    ranks = np.linalg.matrix_rank(matrices, rtol=1e-5)
    assert ranks.tolist() == [RANK] * len(matrices)


def check_linear_in_scaling(case: Case, key: jax.Array) -> None:
    """Law 5: the change of the output is proportional to the scaling."""
    arrays = tuned(case, key)
    base, once, thrice = (case.apply(*arrays, s) for s in (0.0, SCALING, 3 * SCALING))
    assert_close(base, case.base(arrays.x, arrays.kernel))
    assert_close(thrice - base, 3 * (once - base))


def check_count(case: Case, key: jax.Array) -> None:
    """Law 7: the number of trainable elements is the one written down."""
    shapes = jax.eval_shape(case.init, key)
    assert shapes.lora_a.size + shapes.lora_b.size == case.trainable


# --- Gradients


def check_gradients(case: Case, key: jax.Array) -> None:
    """The output is linear in x, A and B, so NumPy's differences are exact slopes."""
    arrays = tuned(case, key)
    weights, grads = loss_and_gradients(case, arrays, key)

    def slope(name: str, direction: np.ndarray) -> float:
        ends = (arrays._replace(**{name: d}) for d in (direction, 0 * direction))
        one, zero = (case.reference(*end, SCALING) for end in ends)
        return float(np.sum(weights * (one - zero)))

    generator = np.random.default_rng(0)
    names = ("x", "lora_a", "lora_b") if is_float(arrays.x) else ("lora_a", "lora_b")
    for name in names:
        gradient = np.asarray(getattr(grads, name), np.float64)
        for _ in range(3):
            direction = generator.normal(size=gradient.shape)
            bound = np.linalg.norm(gradient) * np.linalg.norm(direction)
            error = np.sum(gradient * direction) - slope(name, direction)
            assert abs(error) <= TOLERANCE["float32"] * bound, name


def check_no_base_gradient(case: Case, key: jax.Array) -> None:
    """Law 8: nothing in the gradient's program multiplies into W0's shape."""
    arrays = tuned(case, key)

    def gradients(arrays: Arrays):
        return loss_and_gradients(case, arrays, key)[1]

    shape = sorted(arrays.kernel.shape)
    jaxpr = jax.make_jaxpr(gradients)(arrays)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in PRODUCTS]
    assert products
    assert not [e for e in products if sorted(e.outvars[0].aval.shape) == shape]
    hlo = jax.jit(gradients).lower(arrays).compile().as_text()
    made = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|convolution|scatter)\(", hlo)
    shapes = [sorted(int(n) for n in dims.split(",") if n) for dims in made]
    assert shape not in shapes


def check_second_derivatives(case: Case, key: jax.Array) -> None:
    """Forward and reverse over reverse give the Hessian of the merged layer."""
    arrays = tuned(case, key)

    def loss(apply, factors):
        return jnp.sum(jnp.tanh(apply(*factors)))

    ours = functools.partial(loss, lambda a, b: case.apply(*arrays[:2], a, b, SCALING))
    merged = functools.partial(
        loss, lambda a, b: case.base(arrays.x, case.merge(arrays.kernel, a, b, SCALING))
    )
    factors = arrays[2:]
    forward, reverse, wanted = (
        product(f)
        for product, f in (
            (lambda f: jax.jvp(jax.grad(f), (factors,), (factors,))[1], ours),
            (lambda f: jax.vjp(jax.grad(f), factors)[1](factors)[0], ours),
            (lambda f: jax.jvp(jax.grad(f), (factors,), (factors,))[1], merged),
        )
    )
    for got in (forward, reverse):
        jax.tree.map(functools.partial(assert_close, rtol=1e-4), got, wanted)


# --- Types


def check_bfloat16_base(case: Case, key: jax.Array) -> None:
    """Law 13: a bfloat16 layer stays so; A, B and their gradients are float32."""
    arrays = cast_base(tuned(case, key), "bfloat16")
    got = case.apply(*arrays, SCALING)
    assert got.dtype == jnp.bfloat16
    wide = cast_base(arrays, "float32")
    assert_close(got, case.reference(*wide, SCALING), "bfloat16")
    assert case.merge(*arrays[1:], SCALING).dtype == jnp.bfloat16
    _, grads = loss_and_gradients(case, arrays, key)
    _, wanted = loss_and_gradients(case, wide, key)
    for name in ("lora_a", "lora_b"):
        assert getattr(grads, name).dtype == jnp.float32
        assert_close(getattr(grads, name), getattr(wanted, name), "bfloat16")


# --- Dropout


def check_dropout(case: Case, key: jax.Array) -> None:
    """Law 14: rate 0 is none, rate 1 the base; one key, one mask, both ways."""
    arrays = tuned(case, key)

    def apply(*args, rate, key=None):
        return case.apply(*args, SCALING, dropout_rate=rate, dropout_key=key)

    base = np.asarray(case.base(arrays.x, arrays.kernel))
    none = np.asarray(case.apply(*arrays, SCALING))
    assert np.array_equal(apply(*arrays, rate=0.0), none)
    assert np.array_equal(apply(*arrays, rate=1.0, key=key), base)
    half = functools.partial(apply, rate=0.5, key=key)
    y = half(*arrays)
    assert np.array_equal(y, half(*arrays))
    assert np.array_equal(y, jax.checkpoint(half)(*arrays))
    assert not np.array_equal(y, apply(*arrays, rate=0.5, key=jax.random.key(1)))
    # By linearity <dA, A> = <dB, B> = <dy, y - base> and <dx, x> = <dy, y>, which no
    # other mask in the backward pass would give.
    dy = jax.random.normal(key, y.shape)
    _, pull = jax.vjp(half, *arrays)
    dx, _, da, db = pull(dy)
    change = jnp.vdot(dy, y - base)
    assert_close(jnp.vdot(da, arrays.lora_a), change, rtol=1e-4)
    assert_close(jnp.vdot(db, arrays.lora_b), change, rtol=1e-4)
    assert_close(jnp.vdot(dx, arrays.x), jnp.vdot(dy, y), rtol=1e-4)


def check_dropout_keeps_no_mask(case: Case, key: jax.Array) -> None:
    """Law 14: the backward pass holds x once, no mask and no dropped copy of x."""
    arrays = tuned(case, key)

    def adapted(x, a, b):
        return case.apply(
            x, arrays.kernel, a, b, SCALING, dropout_rate=0.5, dropout_key=key
        )

    kept = jax.tree.leaves(jax.vjp(adapted, arrays.x, *arrays[2:])[1])
    assert not [k for k in kept if k.dtype == bool]
    wide = [k for k in kept if k.size == arrays.x.size]
    assert all(np.array_equal(k.ravel(), arrays.x.ravel()) for k in wide)


# --- Transformations


def check_transformations(case: Case, key: jax.Array) -> None:
    """Laws 16 to 18: jit, vmap, scan and remat change nothing."""
    layers = [tuned(case, k) for k in jax.random.split(key, RANK)]  # as many as ranks
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def apply(arrays: Arrays, scaling: float = SCALING):
        return case.apply(*arrays, scaling)

    loop = jnp.stack([apply(layer) for layer in layers])
    assert_close(jax.vmap(apply)(stacked), loop)
    assert_close(jax.lax.scan(lambda c, s: (c, apply(s)), 0, stacked)[1], loop)
    jitted = jax.jit(apply)
    for i, layer in enumerate(layers):
        assert_close(jitted(layer, SCALING + i), apply(layer, SCALING + i))
    assert jitted._cache_size() == 1

    def gradients(apply):
        f = lambda a, b: jnp.sum(apply(layers[0]._replace(lora_a=a, lora_b=b)) ** 2)
        return jax.jit(jax.grad(f, (0, 1)))(*layers[0][2:])

    jax.tree.map(assert_close, gradients(jax.checkpoint(apply)), gradients(apply))


LAWS = (
    check_silent_at_init,
    check_first_gradient,
    check_variance_of_a,
    check_contraction,
    check_rank,
    check_linear_in_scaling,
    check_count,
    check_gradients,
    check_no_base_gradient,
    check_second_derivatives,
    check_bfloat16_base,
    check_transformations,
)
DROPOUT_LAWS = (check_dropout, check_dropout_keeps_no_mask)


def trials(cases: Sequence[Case]) -> list:
    """Returns every law with every case it is for, as pytest parameters."""
    return [
        pytest.param(law, case, id=f"{law.__name__.removeprefix('check_')}-{case.name}")
        for law in (*LAWS, *DROPOUT_LAWS)
        for case in cases
        if case.dropout or law not in DROPOUT_LAWS
    ]
