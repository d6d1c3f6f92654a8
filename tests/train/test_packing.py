"""Packing: every target occurs once, in its example's row after its own tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.train.packing import ROW_KEYS, fill_rows, plan_rows

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def example(index, length, rng):
    """Unique tokens, so that each can be traced."""
    return {
        "input_ids": np.arange(length) + 100 * index + 1,
        "loss_mask": rng.integers(0, 2, length),
    }


@given(LENGTHS)
def test_each_example_is_in_one_row_and_rows_do_not_overflow(lengths):
    rows = plan_rows(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 for row in rows)
    assert rows == plan_rows(lengths, 12)
    totals = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(rows) == 1 or sum(totals[:2]) > 12  # no two rows fit into one


@given(LENGTHS)
def test_targets_are_neither_lost_nor_duplicated_nor_cross_examples(lengths):
    rng = np.random.default_rng(0)
    examples = [example(i, n, rng) for i, n in enumerate(lengths)]
    plan = plan_rows(lengths, 12)
    batch = fill_rows([[examples[i] for i in row] for row in plan], 12, pad_id=7)
    counted = batch["weights"] == 1
    assert set(np.unique(batch["weights"])) <= {0, 1}
    pairs = list(
        zip(batch["input_ids"][counted], batch["labels"][counted], strict=True)
    )
    expected = [
        (e["input_ids"][p], e["input_ids"][p + 1])
        for e in examples
        for p in range(len(e["input_ids"]) - 1)
        if e["loss_mask"][p + 1]
    ]
    assert sorted(pairs) == sorted(expected)
    padding = batch["segment_ids"] == 0
    assert (batch["input_ids"][padding] == 7).all()
    assert padding.sum() == len(plan) * 12 - sum(lengths)
    for row, members in enumerate(plan):
        for segment, i in enumerate(members, start=1):
            own = batch["segment_ids"][row] == segment
            ids = batch["input_ids"][row][own]
            np.testing.assert_array_equal(ids, examples[i]["input_ids"])
            np.testing.assert_array_equal(
                batch["positions"][row][own], np.arange(lengths[i])
            )
            places = np.flatnonzero(own)
            assert places[-1] - places[0] == lengths[i] - 1  # in one piece


def test_the_fullest_row_that_fits_is_used():
    assert plan_rows([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert plan_rows([5, 5, 5], 5) == [[0], [1], [2]]


def test_many_examples_are_planned_quickly_and_fill_their_rows():
    lengths = np.random.default_rng(0).integers(5, 400, 20_000).tolist()
    rows = plan_rows(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.99


def test_dtypes_and_empty_rows():
    batch = fill_rows([[], []], 3)
    assert tuple(batch) == ROW_KEYS
    assert {k: v.dtype for k, v in batch.items()} == {
        k: np.float32 if k == "weights" else np.int32 for k in ROW_KEYS
    }
    assert not any(v.any() for v in batch.values())


def test_examples_that_do_not_fit_are_listed():
    with pytest.raises(
        ValueError, match=r"1 to 8 tokens.*got 2 .*: 9 \(example 1\), 0 \(example 2\)"
    ):
        plan_rows([8, 9, 0], 8)
