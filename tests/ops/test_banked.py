"""The three ways to apply a bank on a layer, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import banked
from lora_jax.ops.banked import WAYS, banked_update, best_way, row_update

M, IN, RANK, OUT = 4, 6, 2, 5
RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((M, IN, RANK)), RNG.standard_normal((M, RANK, OUT))


def wanted(x, ids):
    each = np.broadcast_to(
        ids.reshape(*ids.shape, *[1] * (x.ndim - 1 - ids.ndim)), x.shape[:-1]
    )
    y = np.zeros((*x.shape[:-1], OUT))
    for place, number in np.ndenumerate(each):
        if number:
            y[place] = x[place] @ A[number] @ B[number]
    return y


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        ((3, IN), [1, 0, 3]),
        ((3, 2, IN), [2, 2, 0]),
        ((3, 2, IN), [[1, 0], [3, 3], [2, 1]]),
        ((2, 2, 2, IN), [0, 0]),
    ],
    ids=["vectors", "rows", "tokens", "none"],
)
def test_each_token_has_its_own_factors(way, shape, ids):
    x, ids = RNG.standard_normal(shape), np.array(ids)
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, A, B))
    got = banked_update(*arrays, jnp.asarray(ids), way=way)
    np.testing.assert_allclose(got, wanted(x, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_mapped_row_sees_the_whole_batch(way):
    x, ids = jnp.asarray(RNG.standard_normal((3, 2, IN)), jnp.float32), jnp.arange(3)
    a, b = jnp.float32(A), jnp.float32(B)
    update = row_update(way)

    def every(x, ids):
        return jax.vmap(lambda x, i: update(x[None], a, b, i)[0])(x, ids)

    np.testing.assert_allclose(
        every(x, ids), banked_update(x, a, b, ids, way=way), rtol=1e-6
    )
    text = str(jax.make_jaxpr(every)(x, ids))
    assert ("grouped_dot" in text) == (way == "sort")
    with pytest.raises(ValueError, match="A and B must not be mapped"):
        jax.vmap(update, in_axes=(None, 0, None, None))(x[:1], a[None], b, ids[0])


@pytest.mark.parametrize(
    ("platform", "sizes", "of_tokens", "wanted"),
    [
        ("cpu", (8, 1, 8), False, "gather"),
        ("cpu", (32, 1, 8), False, "mask"),
        ("tpu", (8, 1, 16), False, "mask"),
        ("gpu", (8, 1, 9), False, "gather"),
        ("tpu", (8, 16, 2), False, "gather"),
        ("cpu", (8, 16, 8), True, "mask"),
        ("cpu", (8, 16, 9), True, "sort"),
        ("tpu", (8, 16, 128), True, "mask"),
    ],
)
def test_the_way_goes_by_rows_tokens_and_adapters(
    platform, sizes, of_tokens, wanted, monkeypatch
):
    monkeypatch.setattr(banked, "target_platform", lambda: platform)
    assert best_way(*sizes, of_tokens=of_tokens) == wanted


@pytest.mark.parametrize(
    ("shape", "count", "wanted"),
    [((8, 1), 3, "gather"), ((8, 1), 2, "mask"), ((2, 4), 9, "sort")],
)
def test_auto_is_the_way_of_the_call(shape, count, wanted):
    x, ids = jnp.ones((*shape, 3)), jnp.zeros(shape, int)
    ids = ids if shape[1] > 1 else ids[:, 0]
    a, b = jnp.ones((count + 1, 3, 2)), jnp.ones((count + 1, 2, 4))
    made = [
        str(
            jax.make_jaxpr(lambda *args, way=way: banked_update(*args, way=way))(
                *arrays
            )
        )
        for arrays in [(x, a, b, ids)]
        for way in ("auto", wanted)
    ]
    assert made[0] == made[1]


def test_ids_out_of_range_and_shapes_are_told():
    x, a, b = jnp.ones((2, 3, IN)), jnp.float32(A), jnp.float32(B)
    for ids in ([4, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"ids must be from 0 to m - 1 = 3; got"):
            banked_update(x, a, b, jnp.array(ids))
        traced = jax.jit(banked_update)(x, a, b, jnp.array(ids))
        assert np.isnan(traced).any(axis=(1, 2)).tolist() == [
            i not in range(4) for i in ids
        ]
    with pytest.raises(ValueError, match=r"each token, \(2, 3\); got \(3,\)"):
        banked_update(x, a, b, jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"with in = 6; got \(4, 6, 2\), \(4, 3, 5\)"):
        banked_update(x, a, jnp.ones((M, 3, OUT)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="way must be one of auto, gather, sort, mask"):
        banked_update(x, a, b, jnp.zeros(2, int), way="slow")
