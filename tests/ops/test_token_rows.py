import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops.token_rows import add_logits, lookup_rows, row_deltas, write_rows
from tests.laws import normal
from tests.reference import assert_close

TABLE, ROWS, TOKENS = normal((11, 5), 0), normal((3, 5), 1), (9, 2, 4)


def written():
    """The table with the rows in it, in NumPy float64."""
    table = np.asarray(TABLE, np.float64).copy()
    table[list(TOKENS)] = np.asarray(ROWS, np.float64)
    return table


@pytest.mark.parametrize("shape", [(), (0,), (2, 5)])
def test_a_lookup_finds_the_rows_in_place_of_the_table_s(shape):
    ids = jnp.arange(np.prod(shape, dtype=int)).reshape(shape)
    got = lookup_rows(TABLE[ids], ids, ROWS, TOKENS)
    np.testing.assert_array_equal(got, written()[np.asarray(ids)].astype(np.float32))


def test_ids_above_and_below_all_tokens_keep_their_own_rows():
    ids = jnp.array([0, 10])
    np.testing.assert_array_equal(
        lookup_rows(TABLE[ids], ids, ROWS, TOKENS), TABLE[ids]
    )


def test_logits_are_those_of_the_written_table():
    x = normal((2, 3, 5), 2)
    deltas = row_deltas(ROWS, TABLE, TOKENS)
    assert_close(add_logits(x @ TABLE.T, x, deltas, TOKENS), x @ written().T)


def test_rows_that_are_the_table_s_change_no_bit():
    own, x = TABLE[jnp.array(TOKENS)], normal((4, 5), 2)
    ids, y = jnp.arange(11), x @ TABLE.T
    np.testing.assert_array_equal(lookup_rows(TABLE, ids, own, TOKENS), TABLE)
    deltas = row_deltas(own, TABLE, TOKENS)
    np.testing.assert_array_equal(add_logits(y, x, deltas, TOKENS), y)


def test_a_repeated_token_gathers_its_gradients():
    ids, dy = jnp.array([4, 4, 0, 9]), normal((4, 5), 3)

    def loss(rows):
        return jnp.vdot(dy, lookup_rows(TABLE[ids], ids, rows, TOKENS))

    want = np.stack([dy[3], np.zeros(5), np.asarray(dy[0] + dy[1])])
    assert_close(jax.grad(loss)(ROWS), want)


def test_a_bfloat16_table_gives_bfloat16():
    table, ids = TABLE.astype("bfloat16"), jnp.array([9, 1])
    found = lookup_rows(table[ids], ids, ROWS, TOKENS)
    assert found.dtype == jnp.bfloat16
    assert (found[0] == ROWS[0].astype("bfloat16")).all()
    assert row_deltas(ROWS, table, TOKENS).dtype == jnp.float32


def test_written_rows_are_a_table_s_or_a_kernel_s_columns():
    np.testing.assert_array_equal(
        write_rows(TABLE, ROWS, TOKENS), np.float32(written())
    )
    turned = write_rows(TABLE.T, ROWS, TOKENS, axis=1)
    np.testing.assert_array_equal(turned, np.float32(written()).T)


def test_there_must_be_a_row_for_each_token():
    message = r"rows must be \[n, d\] = \[2, 5\], one for each token; got \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        lookup_rows(TABLE[:1], jnp.array([0]), ROWS, (1, 2))
