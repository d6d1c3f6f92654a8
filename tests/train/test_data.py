"""Batches: each example once per epoch, few shapes, a deterministic order."""

import numpy as np
import pytest

from lora_jax.train.data import Batches, length_buckets


def make_examples(n=57, seed=0, label=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, n)
    # The first token is the example's number, so that rows can be told apart.
    return [
        {"input_ids": [i + 1] * int(t)} | ({"label": i % 3} if label else {})
        for i, t in enumerate(lengths)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 57, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_each_example_once(batch_size, shuffle):
    examples = make_examples()
    batches = Batches(examples, batch_size, seed=3, shuffle=shuffle)
    assert batches.steps_per_epoch == -(-57 // batch_size)
    for number in (0, 1):
        seen = []
        for batch in batches.epoch(number):
            assert batch["input_ids"].shape[0] == batch_size
            for ids, mask, y, w in zip(
                *(
                    batch[k]
                    for k in ("input_ids", "attention_mask", "labels", "weights")
                ),
                strict=True,
            ):
                if w:
                    i = int(ids[0]) - 1
                    seen.append(i)
                    assert ids[mask == 1].tolist() == examples[i]["input_ids"]
                    assert not ids[mask == 0].any()
                    assert y == examples[i]["label"]
                else:
                    assert not ids.any()
                    assert mask.sum() == 1
        assert sorted(seen) == list(range(57))


def test_only_one_batch_of_an_epoch_has_filler_rows():
    batches = Batches(make_examples(), 8, seed=0)
    filler = [int((b["weights"] == 0).sum()) for b in batches.epoch(0)]
    assert sorted(filler)[:-1] == [0] * (len(filler) - 1)
    assert sum(filler) == 8 * 8 - 57


def test_shapes_are_few_and_fit_their_examples():
    batches = Batches(make_examples(400), 8, seed=0)
    shapes = {b["input_ids"].shape for e in range(3) for b in batches.epoch(e)}
    assert shapes <= {(8, t) for t in batches.buckets}
    assert len(batches.buckets) <= 4


def test_a_subset_of_rows_matches_the_whole_batch():
    batches = Batches(make_examples(), 8, seed=5)
    last = batches.steps_per_epoch - 1
    order = np.random.default_rng(0).permutation(8)
    for step in (0, last, last + 1):
        whole = batches.batch_at(step)
        for rows in (slice(0, 3), slice(3, 8), np.sort(order[:4]), np.array([7])):
            part = batches.batch_at(step, rows)
            for key, value in part.items():
                np.testing.assert_array_equal(value, whole[key][rows])
        assert batches.length_at(step) == whole["input_ids"].shape[1]


def test_the_order_is_a_pure_function_of_seed_and_step():
    a, b = (Batches(make_examples(), 8, seed=5) for _ in range(2))
    forward = [a.batch_at(step) for step in range(20)]
    for step in reversed(range(20)):  # a resumed run starts anywhere
        for key, value in b.batch_at(step).items():
            np.testing.assert_array_equal(value, forward[step][key])
    other = Batches(make_examples(), 8, seed=6)

    def order(x, e):
        return [
            x.indices_at(e * x.steps_per_epoch + i).tolist()
            for i in range(x.steps_per_epoch)
        ]

    assert order(a, 0) != order(a, 1)
    assert order(a, 0) != order(other, 0)


def test_identity_changes_with_everything_that_changes_the_batches():
    examples = make_examples()
    changed = [dict(e) for e in examples]
    changed[3]["label"] = 0 if changed[3]["label"] else 1
    same = Batches(examples, 8, seed=5).identity()
    assert same == Batches(make_examples(), 8, seed=5).identity()
    for other in (
        Batches(examples, 8, seed=6),
        Batches(examples, 9, seed=5),
        Batches(changed, 8, seed=5),
        Batches(examples[:-1], 8, seed=5),
        Batches(examples, 8, [64], seed=5),
    ):
        assert other.identity() != same


def test_dtypes_and_optional_labels():
    batch = Batches(make_examples(label=False), 4).batch_at(0)
    assert {k: v.dtype for k, v in batch.items()} == {
        "input_ids": np.int32,
        "attention_mask": np.int32,
        "weights": np.float32,
    }
    floats = [{"input_ids": [1], "label": 0.5}]
    assert Batches(floats, 1).batch_at(0)["labels"].dtype == np.float32
    assert Batches(make_examples(), 1).batch_at(0)["labels"].dtype == np.int32


def padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= t) for t in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_buckets_leave_the_least_padding(count):
    import itertools

    lengths = np.random.default_rng(count).integers(1, 50, 40).tolist()
    best = min(
        padded(lengths, (*chosen, 56))
        for chosen in itertools.combinations(range(8, 56, 8), count - 1)
    )
    buckets = length_buckets(lengths, count)
    assert padded(lengths, buckets) <= best
    assert len(buckets) <= count
    assert all(b % 8 == 0 for b in buckets)


def test_buckets_of_one_length_and_of_long_texts():
    assert length_buckets([5, 5]) == [8]
    long = length_buckets([3, 131_072, 70_000], 3)
    assert long[-1] == 131_072
    assert len(long) == 3
    assert length_buckets([12, 97], longest=100) == [16, 100]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Batches([], 4), "at least 1 example; got 0"),
        (lambda: Batches(make_examples(), 0), "batch_size must be at least 1; got 0"),
        (lambda: Batches(make_examples(), 1, seed=-1), "seed must be .*; got -1"),
        (lambda: Batches([{"input_ids": []}], 1), r"those at \[0\] have 0"),
        (lambda: Batches(make_examples(), 4, [16, 8]), r"increasing.*\[16, 8\]"),
        (
            lambda: Batches([{"input_ids": [1] * 9}], 4, [8]),
            "longest example has 9 tokens, above the last bucket, 8",
        ),
        (
            lambda: Batches([{"input_ids": [1], "label": 0}, {"input_ids": [1]}], 1),
            "a label, or none; got 1 of 2",
        ),
        (lambda: Batches(make_examples(), 1).batch_at(-1), "step must be .* got -1"),
        (lambda: length_buckets([]), "got 0 lengths"),
        (lambda: length_buckets([0, 3]), "got 2 lengths, the least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("ids", [[0, 1.5], ["a"]], ids=["real", "text"])
def test_ids_that_are_no_integers_are_an_error(ids):
    with pytest.raises(TypeError, match=r"must be integers; got .* at 1\."):
        Batches([{"input_ids": [1]}, {"input_ids": ids}], 1)


def test_labels_that_are_names_are_an_error():
    with pytest.raises(TypeError, match="class numbers or floats; got <U3"):
        Batches([{"input_ids": [1], "label": "pos"}], 1)
