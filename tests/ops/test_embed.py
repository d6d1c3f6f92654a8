import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import lora_attend, lora_embed
from tests import reference
from tests.laws import normal
from tests.reference import assert_close

TABLE, A, B = (
    normal(shape, seed) for seed, shape in enumerate([(11, 5), (11, 3), (3, 5)])
)


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)])
def test_lookup_takes_ids_of_any_shape(shape):
    ids = jnp.arange(np.prod(shape, dtype=int)).reshape(shape)
    got = lora_embed(ids, TABLE, A, B, scaling=0.7)
    assert_close(got, reference.embed(ids, TABLE, A, B, 0.7))


def test_lookup_and_attend_share_one_adapter():
    """A tied head multiplies by the same rows that the lookup returns."""
    rows = lora_embed(jnp.arange(11), TABLE, A, B, scaling=0.7)
    x = normal((2, 5), 4)
    assert_close(lora_attend(x, TABLE, A, B, scaling=0.7), x @ rows.T)


def test_a_repeated_row_gathers_its_gradients():
    ids = jnp.array([3, 3, 3, 1])
    dy = normal((4, 5), 4)

    def loss(a):
        return jnp.vdot(dy, lora_embed(ids, TABLE, a, B, scaling=0.7))

    one_hot = np.eye(11)[np.asarray(ids)]
    want = 0.7 * one_hot.T @ np.asarray(dy, np.float64) @ np.asarray(B, np.float64).T
    assert_close(jax.grad(loss)(A), want)


def test_an_id_out_of_range_is_nan_as_in_take():
    got = lora_embed(jnp.array([0, 11]), TABLE, A, B, scaling=0.7)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


def test_a_bfloat16_table_gives_bfloat16_rows():
    got = lora_embed(jnp.array([0]), TABLE.astype("bfloat16"), A, B, scaling=0.7)
    assert got.dtype == jnp.bfloat16


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(TypeError, match="ids must be integers; got float32"):
        lora_embed(jnp.ones(2), TABLE, A, B, scaling=0.7)
    with pytest.raises(TypeError, match="embedding must be floating-point; got"):
        lora_embed(jnp.array([0]), TABLE.astype(int), A, B, scaling=0.7)
    with pytest.raises(ValueError, match=r"= \[11, 3\], \[3, 5\].*got \(5, 3\)"):
        lora_embed(jnp.array([0]), TABLE, B.T, B, scaling=0.7)
    with pytest.raises(
        ValueError,
        match=r"x must be \[\*b, d\] = \[\*b, 5\] for a table of shape \(11, 5\); "
        r"got \(2, 11\)",
    ):
        lora_attend(jnp.ones((2, 11)), TABLE, A, B, scaling=0.7)
