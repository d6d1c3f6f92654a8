"""Factors in PyTorch's orientation: to leaves and back, for each kind of layer."""

import numpy as np
import pytest

from lora_jax import LoRAConfig
from lora_jax.interop.external import ExternalFactors
from lora_jax.interop.layout import shape_faults, to_factors, to_leaves
from lora_jax.ops.contraction import DENSE, Contraction
from lora_jax.ops.conv import conv_contraction
from lora_jax.ops.experts import EXPERTS
from lora_jax.tree.targets import Site, as_target
from tests.reference import assert_close

HEADS = Contraction(inputs=(0,), outputs=(1, 2))
CASES = {
    "dense": (Site("l", "dense", "kernel", (3, 4), DENSE), ()),
    "heads": (Site("l", "einsum", "kernel", (3, 2, 2), HEADS), ()),
    "conv": (Site("l", "conv", "kernel", (5, 3, 4), conv_contraction(1)), (5,)),
    "experts": (Site("l", "experts", "kernel", (5, 3, 4), EXPERTS), ()),
    "stack": (
        Site("l", "dense", "kernel", (3, 7, 4), DENSE.stacked((1,)), (1,), (1,), (1,)),
        (),
    ),
}


def factors(site, window, rank=2, *, magnitude=True):
    rng = np.random.default_rng(0)
    batch = (5,) if site.kind == "experts" else ()
    a, b, m = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((*batch, rank, 3, *window), (*batch, 4, rank), (4,))
    )
    return ExternalFactors(a, b, 1.5, 1.5 * rank, m if magnitude else None)


@pytest.mark.parametrize("name", CASES)
def test_factors_become_leaves_and_back(name):
    site, window = CASES[name]
    has_magnitude = site.kind != "experts"
    given = factors(site, window, magnitude=has_magnitude)
    index = (6,) if site.scanned_a else ()
    kernel = np.random.default_rng(1).standard_normal(site.kernel_shape)
    weights = {"l/kernel": kernel.astype(np.float32)}
    config = LoRAConfig(rank=2, alpha=3, dora=has_magnitude)
    target = as_target(site, config)
    assert shape_faults("l", site, given) == []
    leaves = to_leaves(site, {index: given}, weights)
    assert {p: x.shape for p, x in leaves.items()} == {
        f"l/{leaf}": shape for leaf, shape in target.leaf_shapes.items()
    }
    found = to_factors(target, leaves, index)
    np.testing.assert_array_equal(found.a, given.a)
    np.testing.assert_array_equal(found.b, given.b)
    assert (found.scaling, found.alpha) == (1.5, 3.0)
    if has_magnitude:
        np.testing.assert_array_equal(found.magnitude, given.magnitude)


def test_a_layer_of_a_stack_without_an_adapter_stays_as_it_was():
    site, _ = CASES["stack"]
    kernel = np.random.default_rng(1).standard_normal((3, 7, 4)).astype(np.float32)
    small, large = (factors(site, (), rank) for rank in (1, 2))
    leaves = to_leaves(site, {(0,): small, (3,): large}, {"l/kernel": kernel})
    norms = np.linalg.norm(kernel, axis=0)
    m = np.moveaxis(np.asarray(leaves["l/magnitude"]), 1, 0)
    assert_close(m[[1, 2, 4, 5, 6]], norms[[1, 2, 4, 5, 6]])
    np.testing.assert_array_equal(m[[0, 3]], [small.magnitude, large.magnitude])
    assert not np.asarray(leaves["l/lora_b"])[:, 1].any()


def test_shapes_and_kinds_that_differ_are_named():
    site, window = CASES["dense"]
    wrong = factors(site, window)._replace(b=np.ones((5, 2)), is_embedding=True)
    assert shape_faults("x", site, wrong, lambda *_: "!") == [
        "unexpected: x is a linear layer; its factors are for an embedding",
        "shape: B of x must be [4, 2]; got [5, 2]!",
    ]
