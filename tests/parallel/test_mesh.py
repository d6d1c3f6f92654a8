import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.parallel.mesh import (
    _sizes,
    check_rows,
    make_mesh,
    nearest_divisor,
    process_rows,
    promote_table,
    shard_batch,
)


class Mesh:
    """A mesh of sizes only: the suite has one device."""

    shape = {"data": 2, "fsdp": 4, "tensor": 2}  # noqa: RUF012 - never changed


def sizes(data, fsdp, tensor, count=8):
    return _sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, count)


def test_minus_one_takes_the_rest():
    assert sizes(-1, 2, 2) == (2, 2, 2)
    assert sizes(1, -1, 1) == (1, 8, 1)
    assert sizes(2, 2, -1, count=4) == (2, 2, 1)


def test_the_default_is_data_parallel():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((-1, 1, 3), r"tensor = 3 must divide the 8 devices; 1 x 3 = 3 does not.* "
         r"works: data = 4, fsdp = 1, tensor = 2\."),
        ((2, 2, 4), r"must take all of the 8 devices; 2 x 2 x 4 = 16 does not.* "
         r"works: data = 1, fsdp = 2, tensor = 4\."),
        ((1, 1, 1), r"1 x 1 x 1 = 1 does not.* works: data = 8, fsdp = 1, tensor = 1"),
        ((-1, -1, 1), r"one may be -1 for the rest; got data = -1, fsdp = -1"),
        ((0, 1, 1), r"positive sizes.*got data = 0"),
        ((2.0, 1, 1), r"positive sizes.*got data = 2\.0"),
    ],
    ids=["undivided", "too-many", "too-few", "two-open", "zero", "float"],
)  # fmt: skip
def test_invalid_sizes_suggest_valid_ones(wanted, message):
    with pytest.raises(ValueError, match=message):
        sizes(*wanted)


def test_the_nearest_divisor_may_be_below_or_above():
    assert [nearest_divisor(12, n) for n in (1, 5, 11, 100)] == [1, 4, 12, 12]


def test_indivisible_rows_are_listed_with_valid_numbers():
    with pytest.raises(
        ValueError,
        match=r"data x fsdp = 2 x 4 = 8; got input_ids 20\. Take 16 or 24\.",
    ):
        check_rows({"input_ids": 20, "weights": 24}, Mesh())  # pyright: ignore[reportArgumentType] - sizes alone
    with pytest.raises(ValueError, match=r"got x 3, y 0\. Take 8\."):
        check_rows({"x": 3, "y": 0}, Mesh())  # pyright: ignore[reportArgumentType] - sizes alone


def test_a_table_is_promoted_without_a_mesh():
    table = promote_table(jnp.ones((4, 2)), dtype=jnp.bfloat16, inexact=False)[0]
    assert table.dtype == jnp.bfloat16


def test_a_single_process_reads_every_row():
    assert process_rows(6, make_mesh()).tolist() == [*range(6)]


@pytest.mark.parametrize("is_local", [False, True], ids=["global", "local"])
def test_a_sharded_batch_holds_the_rows_in_order(is_local):
    batch = {"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}
    sharded = shard_batch(batch, make_mesh(), is_local=is_local)
    for name, leaf in sharded.items():
        assert isinstance(leaf, jax.Array)
        assert leaf.committed
        np.testing.assert_array_equal(leaf, batch[name])
