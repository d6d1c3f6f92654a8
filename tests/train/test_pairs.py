"""Examples and batches of sources and targets."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax.train.pairs import PairBatches, encode_pair, read_pairs


class Letters:
    """A tokenizer: a letter's place in the alphabet; 1 ends every text."""

    special = SimpleNamespace(eos_id=1, stop_ids=(1,))
    vocab_size = 30

    def encode_text(self, text):
        ids = [ord(letter) - ord("a") + 2 for letter in text]
        return SimpleNamespace(ids=ids, spans=[(i, i + 1) for i in range(len(ids))])

    def encode(self, texts):
        return SimpleNamespace(ids=[[*self.encode_text(t).ids, 1] for t in texts])

    def encode_chat(self, messages, *, tools=None):
        raise NotImplementedError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_and_ids_give_the_same_examples(tmp_path):
    file = write(
        tmp_path / "in.jsonl",
        {"prompt": "abc", "completion": "de"},
        {"input_ids": [2, 3, 4, 1], "labels": [5, 6, 1, -100, -100]},
        {"prompt": "abcdefgh", "completion": "abcdefgh"},
    )
    data = read_pairs(file, Letters(), max_length=5, vocab_size=30)
    text, ids, cut = data.examples
    for example in (text, ids):
        assert example["input_ids"].tolist() == [2, 3, 4, 1]
        assert example["labels"].tolist() == [5, 6, 1]
    assert data.truncated == 1
    assert cut["input_ids"].tolist() == [2, 3, 4, 5, 1]  # the end of a source is kept
    assert cut["labels"].tolist() == [2, 3, 4, 5, 6]  # that of a target is cut


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"text": "a"}, "must hold prompt and completion; or input_ids and labels, as"),
        ({"prompt": "a"}, "has no 'completion'; its keys are ['prompt']"),
        ({"prompt": "a", "completion": " "}, "'completion' must not be empty"),
        ({"prompt": 3, "completion": "a"}, "'prompt' must be str; got 3"),
        ({"input_ids": [1], "labels": [-100]}, "'labels' must have at least 1 token"),
        ({"input_ids": [30], "labels": [1]}, "'input_ids': token ids must be in [0, 3"),
        ({"input_ids": [1], "labels": [-100, 1]}, "'labels': token ids must be in [0,"),
        ({"input_ids": [1], "labels": [1.0]}, "'labels' must be a list of integers"),
        (
            {"prompt": "a", "completion": "b", "label": "c"},
            "has an unknown key, 'label'; known: prompt, completion",
        ),
    ],
)
def test_a_bad_line_says_what_is_wrong(record, fault):
    with pytest.raises((ValueError, TypeError)) as caught:
        encode_pair(record, Letters(), vocab_size=30)
    assert fault in str(caught.value)


def test_texts_need_a_tokenizer_with_an_end():
    pair = {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match="must be input_ids and labels: the model has"):
        encode_pair(pair, None, vocab_size=30)
    endless = Letters()
    endless.special = SimpleNamespace(eos_id=None)
    with pytest.raises(ValueError, match="must end with the tokenizer's EOS token"):
        encode_pair(pair, endless, vocab_size=30)


def examples(*lengths):
    return [
        {"input_ids": np.arange(1, s + 1), "labels": np.arange(1, t + 1)}
        for s, t in lengths
    ]


def test_targets_are_padded_to_the_longest_of_a_bucket():
    batches = PairBatches(
        examples((3, 9), (4, 2), (12, 3), (20, 17)), 2, [8, 24], start_id=7
    )
    shapes = {
        batch["input_ids"].shape[1]: batch["labels"].shape[1]
        for batch in batches.epoch(0)
    }
    assert shapes == {8: 16, 24: 24}
    assert batches.targets == 31
    batch = next(b for b in batches.epoch(0) if b["input_ids"].shape[1] == 8)
    row = int(np.argmax(batch["weights"].sum(axis=1)))
    assert batch["attention_mask"].sum(axis=1)[row] == 3
    assert batch["decoder_input_ids"][row, :10].tolist() == [7, *range(1, 9), 0]
    assert batch["labels"][row, :10].tolist() == [*range(1, 10), 0]
    assert batch["weights"][row].tolist() == [1] * 9 + [0] * 7


def test_filler_rows_attend_to_a_token_and_have_no_weight():
    batch = PairBatches(examples((3, 2)), 3, start_id=0).batch_at(0)
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 1, 1]
    assert batch["weights"].sum(axis=1).tolist() == [2, 0, 0]


def test_the_identity_tells_a_token_of_source_and_target_apart():
    def identity(source, target, start_id=0):
        pair = {"input_ids": np.array(source), "labels": np.array(target)}
        return PairBatches([pair], 1, start_id=start_id).identity()["digest"]

    found = {
        identity([1, 2], [3]),
        identity([1, 2], [4]),
        identity([1, 3], [3]),
        identity([1, 2], [3], start_id=1),
    }
    assert len(found) == 4


def test_an_empty_target_is_an_error():
    with pytest.raises(ValueError, match=r"every target must .*; those at \[1\] have"):
        PairBatches(examples((1, 1), (2, 0)), 1, start_id=0)
