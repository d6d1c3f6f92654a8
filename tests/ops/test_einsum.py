import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from lora_jax.ops import init_adapter, lora_einsum, merge_kernel
from lora_jax.ops.einsum import parse_equation
from tests import reference
from tests.laws import normal
from tests.reference import assert_close


@st.composite
def equations(draw):
    """Draws an einsum with its roles in any order, and the sizes of its labels."""
    labels = draw(st.permutations("abcdefgh"))
    counts = [draw(st.integers(low, 2)) for low in (0, 0, 1, 1)]
    roles, start = [], 0
    for count in counts:
        roles.append(labels[start : start + count])
        start += count
    tokens, batch, inputs, outputs = roles
    x, kernel, out = (
        "".join(draw(st.permutations([*shared, *role])))
        for shared, role in (
            (tokens + batch, inputs),
            (batch + inputs, outputs),
            (tokens + batch, outputs),
        )
    )
    sizes = {c: draw(st.integers(1, 3)) for c in x + kernel}
    in_order = [c for role in (batch, inputs, outputs) for c in kernel if c in role]
    split = {c: (c in batch, c in inputs) for c in kernel}
    batch = [c for c in in_order if split[c][0]]
    inputs = [c for c in in_order if split[c][1]]
    outputs = [c for c in in_order if not any(split[c])]
    return f"{x},{kernel}->{out}", (batch, inputs, outputs), sizes


@given(equations(), st.integers(1, 2))
@settings(max_examples=20)
@pytest.mark.filterwarnings("ignore:rank")
def test_random_einsums_equal_the_merged_einsum(drawn, rank):
    equation, (batch, inputs, outputs), sizes = drawn
    x_labels, kernel_labels = equation.split("->")[0].split(",")
    contraction = parse_equation(equation, len(x_labels)).contraction
    x, kernel = (
        normal([sizes[c] for c in labels], seed)
        for seed, labels in enumerate((x_labels, kernel_labels))
    )
    a = normal([sizes[c] for c in batch + inputs] + [rank], 2)
    b = normal([sizes[c] for c in batch] + [rank] + [sizes[c] for c in outputs], 3)
    factors = "{},{}->{}".format(
        "".join([*batch, *inputs, "R"]),
        "".join([*batch, "R", *outputs]),
        kernel_labels,
    )
    got = jax.jit(lora_einsum, static_argnums=0)(equation, x, kernel, a, b, scaling=0.7)
    assert_close(got, reference.einsum(equation, factors, x, kernel, a, b, 0.7))
    merged = merge_kernel(kernel, a, b, scaling=0.7, contraction=contraction)
    assert_close(merged, reference.merge(kernel, a, b, 0.7, factors))


def test_experts_are_initialised_and_trained_independently():
    contraction = parse_equation("ebi,eio->ebo", 3).contraction
    a, b = init_adapter(jax.random.key(0), (3, 7, 5), 2, contraction=contraction)
    assert a.shape == (3, 7, 2)
    assert b.shape == (3, 2, 5)
    assert len({expert.tobytes() for expert in np.asarray(a)}) == 3


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_dots_stand_for_any_leading_dims(leading):
    x, kernel = normal((*leading, 4, 7)), normal((7, 3, 5), 1)
    a, b = normal((7, 2), 2), normal((2, 3, 5), 3)
    args = ("...td,dnh->...tnh", x, kernel, a, b)
    got = lora_einsum(*args, scaling=0.7)
    want = reference.einsum(args[0], "dR,Rnh->dnh", *args[1:], scaling=0.7)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("equation", "x_ndim", "message"),
    [
        ("bi,io", 2, "explicit with two operands, 'x,kernel->out'; got 'bi,io'"),
        ("bi->b", 2, "explicit with two operands"),
        ("bi,io,oj->bj", 2, "explicit with two operands"),
        ("bi,i...->b...", 2, "name every axis of the kernel"),
        ("...i,io->o", 3, r"have '\.\.\.' in the output as well"),
        ("bi,io->...o", 2, r"have '\.\.\.' in x as well"),
        ("...abi,io->...abo", 2, "names 3 axes of x; got 2 axes"),
        ("bi,io->bo", 3, "x must have 2 axes for 'bi,io->bo'; got 3"),
        ("bb,bo->bo", 2, "label 'b' repeats within one array"),
        ("bi,io->bz", 2, "label 'z' of the output is not in any operand"),
        ("bi,io->o", 2, "label 'b' is summed over within a single operand"),
        ("bi,ioz->bo", 2, "label 'z' is summed over within a single operand"),
        ("bi,iR->bR", 2, "label 'R' is reserved for the rank"),
        ("b1,1o->bo", 2, "label '1' is not a letter"),
        ("bi,i->b", 2, "the kernel needs at least one input and one output axis"),
        ("bi,bo->bio", 2, "the kernel needs at least one input and one output axis"),
    ],
)
def test_equations_that_cannot_be_adapted(equation, x_ndim, message):
    with pytest.raises(ValueError, match=message):
        parse_equation(equation, x_ndim)


def test_all_errors_of_an_equation_are_listed():
    with pytest.raises(
        ValueError, match=r"label 'z' of the output.*; label 'b' is sum"
    ):
        parse_equation("bi,io->zo", 2)


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        ((2, 7), (7, 5, 1), r"kernel must have 2 axes for 'bi,io->bo'; got shape"),
        (
            (2, 6),
            (7, 5),
            r"x, kernel must agree on every label of 'bi,io->bo'; got \(2, 6\), "
            r"\(7, 5\): 'i' is 6 in x, 7 in the kernel",
        ),
        ((2, 7), (7, 4), r"= \[7, 2\], \[2, 4\] for a kernel of shape \(7, 4\)"),
    ],
)
def test_incompatible_shapes_are_errors(x, kernel, message):
    a, b = normal((7, 2)), normal((2, 5))
    with pytest.raises(ValueError, match=message):
        lora_einsum("bi,io->bo", normal(x), normal(kernel), a, b, scaling=0.7)
