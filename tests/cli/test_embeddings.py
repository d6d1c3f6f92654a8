"""An embedding model through the commands: trained on pairs, resumed, used."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from tests.models.golden import GOLDEN

MODEL = GOLDEN / "sentence" / "qwen3_embedding"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Documents of one word, each of which stands for a word of a query."""
    place = tmp_path_factory.mktemp("embeddings")

    def row(i):
        return {
            "query": f"w{i % 8} w{16 + i % 3}",
            "positive": f"w{i % 8 + 8}",
            "negative": f"w{(i + 3) % 8 + 8}",
        }

    write(place / "train.jsonl", [row(i) for i in range(48)])
    write(place / "test.jsonl", [row(i) for i in range(8)])
    file = place / "config.yaml"
    file.write_text(
        f"""
model: {{path: {MODEL}}}
data:
  train: {place}/train.jsonl
  validation: {place}/test.jsonl
  test: {place}/test.jsonl
  query_prompt: query
lora: {{rank: 8, alpha: 16}}
train:
  epochs: 12
  batch_size: 8
  learning_rate: 3e-2
  eval_every: 36
  temperature: 0.1
output: {{dir: {place}/run}}
"""
    )
    return file


@pytest.fixture(scope="module")
def run(config):
    assert main(["train", str(config)]) == 0
    return config.parent / "run"


def test_queries_find_their_own_text(run, call):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "accuracy"
    assert summary["baseline"]["test_accuracy"] < 0.5 < summary["test"]["accuracy"]
    code, out, shown = call("eval", "--run", run, "--json")
    assert code == 0, shown
    found = json.loads(out)
    assert found["accuracy"] == summary["test"]["accuracy"]
    assert found["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)


def test_a_stopped_run_resumes_to_the_same_bits(config, run, tmp_path, call):
    again = shutil.copytree(run, tmp_path / "run")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "72")
    words = ["--resume", f"output.dir={again}"]
    code, out, shown = call("train", config, *words)
    assert code == 0, shown
    assert "Resuming at step 36 of 72" in out
    kept, resumed = (
        load_file(folder / "adapter" / "adapter.safetensors") for folder in (run, again)
    )
    assert kept.keys() == resumed.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_embeddings_of_the_adapter_and_of_its_export_are_those_of_the_run(
    config, run, tmp_path, call
):
    lines = (config.parent / "test.jsonl").read_text().splitlines()
    test = [json.loads(line) for line in lines]
    peft, found = tmp_path / "peft", {}
    assert call("export", "--adapter", run, "--out", peft)[0] == 0
    for kind, prompt in (("query", ["--prompt", "query"]), ("positive", [])):
        data = write(tmp_path / f"{kind}.jsonl", [{"text": row[kind]} for row in test])
        for adapter in (run, peft) if kind == "query" else (run,):
            out = tmp_path / f"{kind}_{adapter.name}.jsonl"
            words = ["--adapter", adapter, "--model", MODEL, *prompt]
            code, _, shown = call("encode", *words, "--data", data, "--out", out)
            assert code == 0, shown
            lines = map(json.loads, out.read_text().splitlines())
            found[kind, adapter] = np.array([line["embedding"] for line in lines])
    np.testing.assert_allclose(found["query", run], found["query", peft], atol=1e-6)
    nearest = np.argmax(found["query", run] @ found["positive", run].T, axis=-1)
    summary = json.loads((run / "summary.json").read_text())
    assert np.mean(nearest == np.arange(8)) == summary["test"]["accuracy"]
