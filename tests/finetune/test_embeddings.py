"""The task of an embedding model: its lines, its settings and its accuracy."""

import json
import re

import numpy as np
import pytest

from lora_jax.finetune.embeddings import share_nearest
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.settings import load_settings
from lora_jax.finetune.tasks import open_job
from lora_jax.train.text_pairs import TextPairBatches, has_text_pairs, read_text_pairs
from tests.models.golden import GOLDEN

PAIRS = [{"anchor": "the film", "positive": f"a great film {i}"} for i in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tmp_path):
    def make(model, rows=PAIRS, words=()):
        data = write(tmp_path / "train.jsonl", rows)
        tree = {
            "model": {"path": str(model)},
            "data": {"train": str(data)},
            "output": {"dir": str(tmp_path / "run")},
        }
        return load_settings(tree, list(words))

    return make


def test_an_encoder_is_measured_among_all_texts(model_dir, settings):
    job = open_job(settings(model_dir, words=["data.holdout=0.5"]))
    assert job.method == "embed"
    assert job.data_facts(job.batches())[-1] == (
        "negatives",
        "31 for each query of a batch",
    )
    split = job.splits["train"]
    stream = job.evaluation(split).epoch(0)
    step = job.eval_step(job.loaded.module)
    found = job.measure(step, job.loaded.variables, stream)
    assert found["weight"] == len(split.examples) == 3
    assert 0 < found["loss"] < np.log(3) * 2
    assert found["accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_the_share_nearest_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    queries, keys, others = rng.normal(size=(3, 1500, 4))
    keys[7] = keys[3]  # one text twice
    keys = queries + 0.7 * keys
    known = np.concatenate([keys, others])
    known /= np.linalg.norm(known, axis=-1, keepdims=True)
    own = known[: len(keys)]
    scores = queries @ known.T
    want = np.mean(scores.max(-1) <= np.sum(queries * own, -1) + 1e-9)
    assert share_nearest(queries, keys, others) == want
    assert share_nearest(queries[:1], keys[:1]) == 1


def test_lines_are_told_from_other_tasks(tmp_path):
    found = {
        name: has_text_pairs(write(tmp_path / "a.jsonl", [row]))
        for name, row in {
            "pairs": PAIRS[0],
            "query": {"query": "a", "positve": "b"},
            "labels": {"text": "a", "label": 1},
            "list": ["positive"],
        }.items()
    }
    assert found == {"pairs": True, "query": True, "labels": False, "list": False}
    (tmp_path / "a.jsonl").write_bytes(b"\n\xff{\n")
    assert not has_text_pairs(tmp_path / "a.jsonl")
    assert not has_text_pairs(tmp_path / "none.jsonl")


def test_bad_lines_are_listed(tmp_path):
    rows = [
        PAIRS[0] | {"negative": "no"},
        PAIRS[0],
        {"anchor": "a", "query": "b", "positive": "c"},
        {"anchor": " ", "positive": "c", "negative": "d"},
        {"anchor": "a", "positive": 3, "negative": "d"},
        {"anchor": "a", "positive": "c", "negativ": "d"},
    ]
    with pytest.raises(ValueError, match="5 bad lines") as caught:
        read_text_pairs(write(tmp_path / "a.jsonl", rows))
    for number, text in enumerate(
        (
            "must have a 'negative', as the lines before",
            "must have 'anchor' or 'query', and 'positive'; its keys are",
            "'anchor' must be a text that is not empty; got ' '",
            "'positive' must be a text that is not empty; got 3",
            "has an unknown key, 'negativ'; did you mean 'negative'?",
        ),
        start=2,
    ):
        assert f"a.jsonl:{number}: {text}" in str(caught.value)


def test_settings_that_embeddings_cannot_have_are_listed(settings):
    model = GOLDEN / "sentence" / "qwen3_embedding"
    words = (
        *("data.packing=true", "model.pooling=cls", "train.label_smoothing=0.1"),
        *("train.batch_size=8", "train.accumulate=8", "lora.init=eva"),
    )
    for text in (
        "data.packing and train.samples are for decoders of text",
        "label_smoothing and train.router_aux_loss_coef must be 0; got 0.1 and 0.0",
        "model.pooling must be 'mean'.*got 'cls'",
        "batch_size must be at least 2 for each of train.accumulate = 8.*got 8",
        "lora.init must not be 'eva'",
    ):
        with pytest.raises(UserError, match=text):
            open_job(settings(model, words=words))
    with pytest.raises(UserError, match=r"must have a modules\.json"):
        open_job(settings(GOLDEN / "llama"))
    with pytest.raises(UserError, match=r"must read texts only; .* is a DualConfig"):
        open_job(settings(GOLDEN / "clip"))
    with pytest.raises(UserError, match="must not be SigLIP's, which sees its padding"):
        open_job(settings(GOLDEN / "siglip_text"))
    with pytest.raises(UserError, match="is an encoder of CLIP or SigLIP: train"):
        open_job(settings(GOLDEN / "clip_text", [{"text": "a", "label": 1}] * 4))
    with pytest.raises(UserError, match=re.escape("prompt must be one of")):
        open_job(settings(model, words=["data.query_prompt=qurey"]))
    labelled = [{"text": "a", "label": i % 2} for i in range(4)]
    with pytest.raises(UserError, match=r"temperature, .* are for pairs of texts"):
        open_job(settings(model, labelled, ["train.temperature=0.1"]))


def test_batches_pad_a_row_to_its_longest_text():
    data = [{"texts": ([5], [6] * n, [7, 8])} for n in (3, 9, 2)]
    batches = TextPairBatches(data, 2, [4, 16], shuffle=False)
    first, second = batches.epoch(0)
    assert first["negative_ids"].shape == (2, 4)
    assert first["positive_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert second["input_ids"].shape == (2, 16)
    assert second["weights"].tolist() == [1, 0]
    assert second["attention_mask"].sum(axis=1).tolist() == [1, 1]
    other = TextPairBatches([*data[:2], {"texts": ([5], [6, 6], [7, 9])}], 2, [4, 16])
    assert other.identity()["digest"] != batches.identity()["digest"]
