"""Lines of text or token ids: their faults, and batches of similar lengths."""

from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax.finetune.encode import record_fault
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.lines import by_length, check_faults, check_ids, text_fault


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"text": "a"}, ""),
        ({"input_ids": [1]}, ""),
        ({"text": "a", "input_ids": [1]}, "must have 'text' or 'input_ids'"),
        ({"label": 1}, "its keys are ['label']"),
        ({"text": 3}, "'text' must be a string; got 3"),
        ({"input_ids": []}, "list of integers, at least 1; got []"),
        ({"input_ids": [True]}, "list of integers, at least 1; got [True]"),
        ({"input_ids": "12"}, "list of integers, at least 1; got '12'"),
    ],
)
def test_a_fault_of_a_line_is_said(record, fault):
    found = text_fault(record)
    assert fault in found
    assert bool(fault) == bool(found)


@pytest.mark.parametrize(
    ("mask", "is_fit"),
    [([1, 0], True), ([1], False), ([1, 2], False), ("10", False)],
)
def test_a_mask_is_a_bit_for_each_token(mask, is_fit):
    found = record_fault({"input_ids": [4, 5], "attention_mask": mask})
    assert (found == "") == is_fit


def test_a_mask_needs_ids():
    assert "per 'input_ids' entry" in record_fault({"text": "a", "attention_mask": [1]})


def test_the_first_twenty_faults_are_shown_and_the_others_counted():
    check_faults("bad lines", [])
    with pytest.raises(UserError) as caught:
        check_faults("bad lines", [f"line {i}" for i in range(1, 24)])
    shown = str(caught.value).splitlines()
    assert shown[0] == "bad lines:"
    assert shown[20:] == ["  line 20", "  and 3 more"]


def test_ids_are_those_of_the_model():
    config = SimpleNamespace(max_positions=3, vocab_size=9)
    check_ids([[0, 8], [1, 2, 3]], config, "in.jsonl")
    with pytest.raises(UserError) as caught:
        check_ids([[0, 9], [1], [], [1] * 4, [-1, 3]], config, "in.jsonl")
    assert str(caught.value).splitlines()[1:] == [
        "  in.jsonl: example 1: ids must be in [0, 9); got 0 to 9",
        "  in.jsonl: example 3: must have 1 to 3 tokens, the model's context; got 0",
        "  in.jsonl: example 4: must have 1 to 3 tokens, the model's context; got 4",
        "  in.jsonl: example 5: ids must be in [0, 9); got -1 to 3",
    ]


def test_batches_hold_each_line_once_with_all_its_columns():
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 9, n).tolist() for n in rng.integers(1, 30, 11)]
    twice = [[2 * i for i in row] for row in ids]
    seen, widths = {}, []
    for members, (a, b) in by_length(4, 64, ids, twice):
        assert a.shape == b.shape == (4, a.shape[1])
        widths.append(a.shape[1])
        np.testing.assert_array_equal(b, 2 * a)
        assert not a[len(members) :].any()
        seen |= {int(m): row for m, row in zip(members, a, strict=False)}
    assert sorted(seen) == list(range(11))
    assert widths == sorted(widths)
    for member, row in seen.items():
        own = ids[member]
        assert row.tolist() == own + [0] * (len(row) - len(own))
