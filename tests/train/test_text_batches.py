"""Batches for language models: each target once per epoch, a deterministic order."""

import numpy as np
import pytest

from lora_jax.train.data import TextBatches
from lora_jax.train.packing import ROW_KEYS

KINDS = pytest.mark.parametrize("packed", [None, 64], ids=["bucketed", "packed"])


def make_examples(n=57, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for i, t in enumerate(rng.integers(2, 60, n)):
        mask = rng.integers(0, 2, t)
        ids = np.arange(t) + 100 * i + 1  # found nowhere else
        examples.append({"input_ids": ids, "loss_mask": mask})
    return examples


def pairs_of(batch):
    used = batch["weights"] > 0
    places = (batch["input_ids"][used], batch["labels"][used])
    return [(int(a), int(b)) for a, b in zip(*places, strict=True)]


@KINDS
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_each_target_once(packed, batch_size, shuffle):
    examples = make_examples()
    batches = TextBatches(
        examples, batch_size, packed_length=packed, seed=3, shuffle=shuffle
    )
    expected = sorted(
        (int(e["input_ids"][p]), int(e["input_ids"][p + 1]))
        for e in examples
        for p in range(len(e["input_ids"]) - 1)
        if e["loss_mask"][p + 1]
    )
    assert batches.targets == len(expected)
    for number in (0, 1):
        epoch = list(batches.epoch(number))
        assert sorted(pair for batch in epoch for pair in pairs_of(batch)) == expected
        assert {b["input_ids"].shape[1] for b in epoch} <= set(batches.buckets)
        assert all(tuple(b) == ROW_KEYS for b in epoch)
        assert {b[k].shape[0] for b in epoch for k in ROW_KEYS} == {batch_size}


@KINDS
def test_the_told_fraction_of_tokens_is_that_of_every_epoch(packed):
    examples = make_examples()
    batches = TextBatches(examples, 4, packed_length=packed)
    for number in (0, 3):
        real = [b["segment_ids"] > 0 for b in batches.epoch(number)]
        share = sum(r.sum() for r in real) / sum(r.size for r in real)
        assert share == pytest.approx(batches.token_fraction, rel=1e-9)
    assert batches.examples == 57
    assert (len(batches) < 57) is (packed is not None)


def test_packing_wastes_less_than_buckets():
    examples = make_examples(400)
    packed = TextBatches(examples, 4, packed_length=128).token_fraction
    assert packed > 0.95 > TextBatches(examples, 4).token_fraction


@KINDS
def test_a_subset_of_rows_matches_the_whole_batch(packed):
    batches = TextBatches(make_examples(), 4, packed_length=packed, seed=5)
    for step in range(batches.steps_per_epoch):
        whole = batches.batch_at(step)
        for rows in (slice(0, 2), np.array([1, 3])):
            for key, value in batches.batch_at(step, rows).items():
                np.testing.assert_array_equal(value, whole[key][rows])


@KINDS
def test_the_order_is_a_pure_function_of_seed_and_step(packed):
    a, b = (
        TextBatches(make_examples(), 4, packed_length=packed, seed=5) for _ in range(2)
    )
    forward = [a.batch_at(step) for step in range(30)]
    for step in reversed(range(30)):  # a resumed run starts anywhere
        for key, value in b.batch_at(step).items():
            np.testing.assert_array_equal(value, forward[step][key])
    first = [a.indices_at(i).tolist() for i in range(a.steps_per_epoch)]
    n = a.steps_per_epoch
    assert first != [a.indices_at(n + i).tolist() for i in range(n)]


def test_identity_changes_with_everything_that_changes_the_batches():
    examples = make_examples()
    masked, other = [[dict(e) for e in examples] for _ in range(2)]
    masked[3]["loss_mask"] = 1 - masked[3]["loss_mask"]
    other[3]["input_ids"] = other[3]["input_ids"] + 1
    same = TextBatches(examples, 8, packed_length=64, seed=5).identity()
    assert same == TextBatches(make_examples(), 8, packed_length=64, seed=5).identity()
    identities = [
        same,
        TextBatches(examples, 8, seed=5).identity(),
        TextBatches(examples, 8, [64], seed=5).identity(),
        *(
            TextBatches(data, size, packed_length=length, seed=seed).identity()
            for data, size, length, seed in (
                (examples, 8, 64, 6),
                (examples, 9, 64, 5),
                (examples, 8, 65, 5),
                (masked, 8, 64, 5),
                (other, 8, 64, 5),
                (examples[:-1], 8, 64, 5),
            )
        ),
    ]
    assert len({str(identity) for identity in identities}) == len(identities)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: TextBatches([], 4), "TextBatches needs at least 1 example; got 0"),
        (lambda e: TextBatches([], 4, packed_length=8), "at least 1 example; got 0"),
        (
            lambda e: TextBatches(e, 4, [64], packed_length=64),
            r"buckets = \[64\] and packed_length = 64 must not both",
        ),
        (lambda e: TextBatches(e, 4, packed_length=3), "must have 1 to 3 tokens"),
        (lambda e: TextBatches(e, 4, [8]), "above the last bucket, 8"),
        (lambda e: TextBatches(e, 0), "batch_size must be at least 1; got 0"),
        (
            lambda e: TextBatches([{"input_ids": [1, 2], "loss_mask": [1]}], 1),
            r"\(2,\) and \(1,\) at 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_examples())
