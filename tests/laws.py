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
PRODUCTS = (
    *("dot_general", "conv_general_dilated", "grouped_dot", "grouped_outer"),
    *("scatter-add", "scatter"),
)


class Arrays(NamedTuple):
    """The arguments of one layer; `Case.zero` is zero as `Case.init` makes it."""

    x: jax.Array
    kernel: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array


class Case(NamedTuple):
    """One member that claims to be LoRA.

    Attributes:
      name: shown in the test's id.
      init: ``init(key) -> Arrays``, float32, fresh, of rank `RANK`.
      apply: ``apply(x, kernel, lora_a, lora_b, scaling, **dropout) -> y``.
      base: ``base(x, kernel) -> y``: the plain layer, somebody else's code.
      merge: ``merge(kernel, lora_a, lora_b, scaling) -> kernel``.
      reference: as ``apply``, in NumPy float64.
      matrices: ``matrices(kernel) -> [n, in, out]``, one for each expert or group.
      fan_in: of one matrix, as the factor that is drawn counts it.
      trainable: elements of A and B together, counted by hand.
      dropout: whether ``apply`` takes ``dropout_rate`` and ``dropout_key``.
      zero: the factor that is zero at init: ``lora_b``, of embeddings ``lora_a``.
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
    zero: str = "lora_b"

    @property
    def drawn(self) -> str:
        """The factor that is not zero at init."""
        return "lora_a" if self.zero == "lora_b" else "lora_b"


# Random bits take XLA seconds to optimise, for nothing where they are drawn once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def compiled_init(case: Case) -> Callable[..., Arrays]:
    return jax.jit(case.init, compiler_options=QUICK)


def tuned(case: Case, key: jax.Array) -> Arrays:
    """Returns the case's arrays with neither factor zero."""
    return moved(case, compiled_init(case)(key))


def moved(case: Case, arrays: Arrays) -> Arrays:
    """Returns arrays whose factor that started at zero has changed."""
    shape = getattr(arrays, case.zero).shape
    return arrays._replace(**{case.zero: normal(shape)})


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Draws in NumPy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def cast_base(arrays: Arrays, dtype: str) -> Arrays:
    """Casts the input and the kernel; A and B stay float32."""
    x = arrays.x.astype(dtype) if is_float(arrays.x) else arrays.x
    return arrays._replace(x=x, kernel=arrays.kernel.astype(dtype))


def in_float64(check):
    """Runs a law with float64 on: sums of many terms then need no looser tolerance."""

    @functools.wraps(check)
    def run(case: Case, key: jax.Array) -> None:
        with jax.enable_x64(True):
            check(case, key)

    return run


def widened(arrays: Arrays) -> Arrays:
    """Returns the arrays as float64, under `in_float64`."""
    return jax.tree.map(lambda a: a.astype("float64") if is_float(a) else a, arrays)


def out_shape(case: Case, arrays: Arrays) -> tuple[int, ...]:
    return jax.eval_shape(lambda a: case.apply(*a, SCALING), arrays).shape


def gradients(case: Case, arrays: Arrays, weights: jax.Array) -> Arrays:
    """Differentiates ``sum(weights * y)`` by A, B and floating x; W0 gets None."""
    names = ["lora_a", "lora_b"] + ["x"] * is_float(arrays.x)

    def loss(trainable):
        return jnp.sum(weights * case.apply(*arrays._replace(**trainable), SCALING))

    grads = jax.grad(loss)({name: getattr(arrays, name) for name in names})
    return Arrays(grads.get("x"), None, grads["lora_a"], grads["lora_b"])


@functools.cache
def gradient_program(case: Case) -> tuple[Callable[..., Arrays], jax.Array]:
    """Returns the compiled gradients of a float32 case, and their weights."""
    arrays = jax.eval_shape(case.init, jax.random.key(0))
    weights = normal(out_shape(case, arrays), seed=1)
    program = jax.jit(functools.partial(gradients, case))
    return program.lower(arrays, weights).compile(), weights


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
    apply = jax.jit(functools.partial(case.apply, scaling=SCALING))
    fresh = compiled_init(case)(key)
    assert np.any(getattr(fresh, case.drawn))
    for dtype in ("float32", "bfloat16"):
        arrays = cast_base(fresh, dtype)
        base = jax.jit(case.base)(arrays.x, arrays.kernel)
        got = apply(*arrays)
        assert got.dtype == base.dtype == dtype
        assert np.array_equal(got, base)
        assert not np.array_equal(apply(*moved(case, arrays)), base)


def check_first_gradient(case: Case, key: jax.Array) -> None:
    """Law 2: at B = 0, dA = 0 and dB is not."""
    program, weights = gradient_program(case)
    grads = program(compiled_init(case)(key), weights)
    assert not np.any(getattr(grads, case.drawn))
    assert np.mean(np.asarray(getattr(grads, case.zero)) != 0) > 0.9


def check_variance_of_a(case: Case, key: jax.Array) -> None:
    """Law 3: A ~ U(±1/√fan_in), std·√fan_in = 0.577, whatever the shape."""
    keys = jax.random.split(key, 40)
    init = compiled_init(case)
    draws = np.stack([np.asarray(getattr(init(k), case.drawn)) for k in keys])
    bound = case.fan_in**-0.5
    assert 0.97 * bound < np.abs(draws).max() <= bound
    np.testing.assert_allclose(draws.std() / bound, 3**-0.5, rtol=0.05)
    assert len(np.unique(draws[0])) > 0.99 * draws[0].size  # no expert copies another


def check_contraction(case: Case, key: jax.Array) -> None:
    """Laws 4, 6: the layer is the base with the merged kernel, and NumPy agrees."""
    arrays = tuned(case, key)
    got = jax.jit(case.apply)(*arrays, SCALING)
    assert_close(got, case.reference(*arrays, SCALING))
    merged = jax.jit(case.merge)(*arrays[1:], SCALING)
    assert_close(jax.jit(case.base)(arrays.x, merged), got)


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
    apply = jax.jit(case.apply)
    base, once, thrice = (apply(*arrays, s) for s in (0.0, SCALING, 3 * SCALING))
    assert_close(base, jax.jit(case.base)(arrays.x, arrays.kernel))
    assert_close(thrice - base, 3 * (once - base))


def check_count(case: Case, key: jax.Array) -> None:
    """Law 7: the number of trainable elements is the one written down."""
    shapes = jax.eval_shape(case.init, key)
    assert shapes.lora_a.size + shapes.lora_b.size == case.trainable


# --- Gradients


def check_gradients(case: Case, key: jax.Array) -> None:
    """The output is linear in x, A and B, so NumPy's differences are exact slopes."""
    arrays = tuned(case, key)
    program, weights = gradient_program(case)
    grads = program(arrays, weights)

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
    arrays = compiled_init(case)(key)
    weights = normal(out_shape(case, arrays), seed=1)
    shape = sorted(arrays.kernel.shape)
    traced = jax.jit(functools.partial(gradients, case)).trace(arrays, weights)
    products = [e for e in equations(traced.jaxpr) if e.primitive.name in PRODUCTS]
    assert products
    assert not [e for e in products if sorted(e.outvars[0].aval.shape) == shape]
    pattern = r"= \w+\[([\d,]*)\]\S* (?:dot|convolution|scatter)\("
    made = re.findall(pattern, traced.lower().compile().as_text())
    shapes = [sorted(int(n) for n in dims.split(",") if n) for dims in made]
    assert shape not in shapes


@in_float64
def check_second_derivatives(case: Case, key: jax.Array) -> None:
    """Forward and reverse over reverse give the Hessian of the merged layer."""
    arrays = widened(tuned(case, key))

    def loss(apply, factors):
        return jnp.sum(jnp.tanh(apply(*factors)))

    ours = functools.partial(loss, lambda a, b: case.apply(*arrays[:2], a, b, SCALING))
    merged = functools.partial(
        loss, lambda a, b: case.base(arrays.x, case.merge(arrays.kernel, a, b, SCALING))
    )

    def forward(loss, factors):
        return jax.jvp(jax.grad(loss), (factors,), (factors,))[1]

    def reverse(loss, factors):
        return jax.vjp(jax.grad(loss), factors)[1](factors)[0]

    pairs = ((forward, ours), (reverse, ours), (forward, merged))
    once, twice, wanted = jax.jit(
        lambda factors: [product(loss, factors) for product, loss in pairs]
    )(arrays[2:])
    for got in (once, twice):
        jax.tree.map(functools.partial(assert_close, dtype="float64"), got, wanted)


# --- Types


def check_bfloat16_base(case: Case, key: jax.Array) -> None:
    """Law 13: a bfloat16 layer stays so; A, B and their gradients are float32."""
    arrays = cast_base(tuned(case, key), "bfloat16")
    got = jax.jit(case.apply)(*arrays, SCALING)
    assert got.dtype == jnp.bfloat16
    wide = cast_base(arrays, "float32")
    assert_close(got, case.reference(*wide, SCALING), "bfloat16")
    assert case.merge(*arrays[1:], SCALING).dtype == jnp.bfloat16
    program, weights = gradient_program(case)
    grads = jax.jit(functools.partial(gradients, case))(arrays, weights)
    wanted = program(wide, weights)
    for name in ("lora_a", "lora_b"):
        assert getattr(grads, name).dtype == jnp.float32
        assert_close(getattr(grads, name), getattr(wanted, name), "bfloat16")


# --- Dropout


@in_float64
def check_dropout(case: Case, key: jax.Array) -> None:
    """Law 14: rate 0 is none, rate 1 the base; one key, one mask, both ways."""
    arrays = widened(tuned(case, key))
    dy = normal(out_shape(case, arrays), seed=1).astype("float64")
    # This kind of key compiles in a tenth of the time.
    one, other = (jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 1))

    @functools.partial(jax.jit, static_argnames="rate")
    def apply(arrays, rate, key=None):
        return case.apply(*arrays, SCALING, dropout_rate=rate, dropout_key=key)

    @jax.jit
    def both_ways(arrays, key):
        y, pull = jax.vjp(lambda *args: apply(args, 0.5, key), *arrays)
        return y, pull(dy), jax.checkpoint(apply, static_argnums=1)(arrays, 0.5, key)

    base = jax.jit(case.base)(arrays.x, arrays.kernel)
    assert np.array_equal(apply(arrays, 0.0), jax.jit(case.apply)(*arrays, SCALING))
    assert np.array_equal(apply(arrays, 1.0, one), base)
    y, (dx, _, da, db), rematerialised = both_ways(arrays, one)
    assert_close(y, apply(arrays, 0.5, one), "float64")
    assert_close(y, rematerialised, "float64")
    assert not np.allclose(y, apply(arrays, 0.5, other))
    # By linearity <dA, A> = <dB, B> = <dy, y - base> and <dx, x> = <dy, y>, which no
    # other mask in the backward pass would give.
    change = np.vdot(dy, y - base)
    assert_close(np.vdot(da, arrays.lora_a), change, "float64")
    assert_close(np.vdot(db, arrays.lora_b), change, "float64")
    assert_close(np.vdot(dx, arrays.x), np.vdot(dy, y), "float64")


def check_dropout_keeps_no_mask(case: Case, key: jax.Array) -> None:
    """Law 14: the backward pass holds x once, no mask and no dropped copy of x."""
    arrays = tuned(case, key)

    def adapted(x, a, b):
        rbg = jax.random.key(0, impl="unsafe_rbg")
        return case.apply(
            x, arrays.kernel, a, b, SCALING, dropout_rate=0.5, dropout_key=rbg
        )

    pull = jax.jit(lambda *args: jax.vjp(adapted, *args)[1])(arrays.x, *arrays[2:])
    kept = jax.tree.leaves(pull)
    assert not [k for k in kept if k.dtype == bool]
    wide = [np.asarray(k) for k in kept if k.size == arrays.x.size]
    assert all(np.array_equal(k.ravel(), np.ravel(arrays.x)) for k in wide)


# --- Transformations


def check_transformations(case: Case, key: jax.Array) -> None:
    """Laws 16 to 18: jit, vmap, scan and remat change nothing."""
    layers = [tuned(case, k) for k in jax.random.split(key, RANK)]  # as many as ranks
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    def apply(arrays: Arrays, scaling: float = SCALING):
        return case.apply(*arrays, scaling)

    jitted = jax.jit(apply)
    loop = np.stack([jitted(layer, SCALING + i) for i, layer in enumerate(layers)])
    assert jitted._cache_size() == 1
    assert_close(loop[0], apply(layers[0], SCALING))
    scalings = np.float32(SCALING) + np.arange(len(layers), dtype=np.float32)
    assert_close(jax.jit(jax.vmap(apply))(stacked, scalings), loop)
    step = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, apply(*x)), 0, xs)[1])
    assert_close(step((stacked, scalings)), loop)

    @jax.jit
    def remat(arrays, weights):
        rematerialised = case._replace(apply=jax.checkpoint(case.apply))
        return gradients(rematerialised, arrays, weights)

    program, weights = gradient_program(case)
    wanted = program(layers[0], weights)
    jax.tree.map(assert_close, remat(layers[0], weights), wanted)


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
# Laws of bits and of programs hold for what users run.
OPTIMIZED_LAWS = (check_silent_at_init, check_no_base_gradient)


def trials(cases: Sequence[Case]) -> list:
    """Returns every law with every case it is for, as pytest parameters."""
    return [
        pytest.param(
            *(law, case),
            id=f"{law.__name__.removeprefix('check_')}-{case.name}",
            marks=[pytest.mark.optimized] if law in OPTIMIZED_LAWS else [],
        )
        for law in (*LAWS, *DROPOUT_LAWS)
        for case in cases
        if case.dropout or law not in DROPOUT_LAWS
    ]
