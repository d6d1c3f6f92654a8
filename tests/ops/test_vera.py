"""VeRA against the paper's formula in NumPy float64, and under the laws of LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import Contraction, lora_dense
from lora_jax.ops.conv import conv_contraction
from lora_jax.ops.factors import Factors
from lora_jax.ops.merge import delta_kernel
from lora_jax.ops.vera import vera_factors
from tests import laws, reference
from tests.cases import OP_CASES
from tests.laws import RANK, Arrays, Case, normal, trials
from tests.reference import assert_close

DENSE = next(case for case in OP_CASES if case.name == "dense")
KERNEL = (10, 8)


@functools.cache
def projections() -> Factors:
    return vera_factors(KERNEL, RANK)


def plain(d, b) -> tuple[jax.Array, jax.Array]:
    return projections()._replace(vera_d=d, vera_b=b).plain()[:2]


def vera_case() -> Case:
    """The layer with its trained vectors where `Case` has A and B."""

    def init(key):
        x, kernel = DENSE.init(key)[:2]
        found = vera_factors(KERNEL, RANK)
        return Arrays(x, kernel, found.vera_d, found.vera_b)

    def apply(x, kernel, d, b, scaling, **dropout):
        return lora_dense(x, kernel, *plain(d, b), scaling=scaling, **dropout)

    def wanted(x, kernel, d, b, scaling):
        frozen = (np.asarray(leaf, np.float64) for leaf in projections()[:2])
        d, b = (np.diag(np.asarray(leaf, np.float64).ravel()) for leaf in (d, b))
        own_a, own_b = frozen
        return reference.dense(x, kernel, own_a @ d, own_b @ b, scaling)

    return DENSE._replace(
        name="vera",
        init=init,
        apply=apply,
        merge=lambda kernel, d, b, scaling: DENSE.merge(kernel, *plain(d, b), scaling),
        reference=wanted,
        trainable=RANK + 8,
    )


# Law 3 is on a drawn A; that VeRA's is frozen and of another width is tested below.
TRIALS = [
    t for t in trials([vera_case()]) if t.values[0] is not laws.check_variance_of_a
]


@pytest.mark.parametrize(("law", "case"), TRIALS)
def test_law(law, case, key):
    projections()
    law(case, key)


def test_a_and_b_are_kaiming_uniform_and_prefixes_of_larger_ones():
    large = vera_factors((400, 300), 64, seed=3)
    for factor, fan in ((large.lora_a, 400), (large.lora_b, 64)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < abs(factor).max() <= bound
        np.testing.assert_allclose(np.std(factor) / bound, 3**-0.5, rtol=0.02)
    small = vera_factors((100, 30), 64, seed=3)
    assert_close(small.lora_a, 2 * large.lora_a[:100])
    np.testing.assert_array_equal(small.lora_b, large.lora_b[:, :30])
    assert abs(vera_factors((100, 30), 64).lora_b - small.lora_b).max() > 0.1
    assert len(np.unique(large.lora_b)) > 0.99 * large.lora_b.size


@pytest.mark.parametrize(
    ("shape", "contraction", "factors"),
    [
        ((9, 2, 4), Contraction(inputs=(0,), outputs=(1, 2)), "ir,ro->io"),
        ((3, 7, 6), Contraction((0,), (1,), (2,)), "eir,ero->eio"),
        ((3, 2, 6), conv_contraction(1, groups=2), None),
    ],
    ids=["heads", "experts", "groups"],
)
def test_the_update_is_a_diag_d_b_diag_b(shape, contraction, factors):
    fresh = vera_factors(shape, 2, contraction=contraction)
    np.testing.assert_array_equal(fresh.vera_d, jnp.full(fresh.vera_d.shape, 0.1))
    assert not fresh.vera_b.any()
    d, b = (normal(leaf.shape, seed=i) for i, leaf in enumerate(fresh[5:]))
    moved = fresh._replace(vera_d=d, vera_b=b)
    options = {"scaling": 0.7, "contraction": contraction}
    got = delta_kernel(*moved.plain(contraction)[:2], shape, **options)
    if factors is None:  # groups are a batch axis of A and B, and part of the outputs
        own_a, own_b = (np.asarray(leaf, np.float64) for leaf in fresh[:2])
        own_a = own_a.reshape(2, 6, 2)
        wanted = np.einsum("gir,gr,gro,go->igo", own_a, d[..., 0], own_b, b[:, 0])
        assert_close(got, 0.7 * wanted.reshape(shape))
        return
    batch, inputs, outputs = (np.prod(s, dtype=int) for s in contraction.split(shape))
    wanted = [
        np.float64(a) @ np.diag(d) @ np.float64(own) @ np.diag(b)
        for a, own, d, b in zip(
            fresh.lora_a.reshape(batch, inputs, 2),
            fresh.lora_b.reshape(batch, 2, outputs),
            np.float64(d).reshape(batch, 2),
            np.float64(b).reshape(batch, outputs),
            strict=True,
        )
    ]
    assert_close(got, 0.7 * np.stack(wanted).reshape(shape))


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        vera_factors((4, 3), 0)
