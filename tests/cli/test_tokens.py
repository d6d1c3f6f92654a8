"""Rows of tokens through the commands: trained, resumed, merged, exported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import fine_tune, load_model
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.finetune.report import token_table
from tests.cli.test_language import write
from tests.finetune.test_run import adapter_of
from tests.tiny_decoder import make_decoder

TEXT = "what is <tool> sky ? </tool> sea"
IDS = jnp.array([[15, 10, 43, 12, 6, 44, 14]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("tokens")
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {"prompt": f"what <tool> is {thing} ? ", "completion": f"{colour} </tool> ."}
        for thing, colour in answers.items()
    ] * 4
    steps = {"batch_size": 2, "epochs": 2, "max_steps": 4, "eval_every": 2}
    steps |= {"learning_rate": 0.1, "baseline": False}
    tree = {
        "model": {"path": str(base), "add_tokens": ["<tool>", "</tool>"]},
        "data": {"train": str(write(place / "train.jsonl", rows)), "packing": True},
        "lora": {"rank": 2, "targets": ["q_proj"], "tokens": ["sky", "sea", 6]},
        "train": steps,
        "output": {"dir": str(place / "run")},
    }
    tree["data"] |= {"max_length": 24, "holdout": 0.25}
    return fine_tune(tree)


@pytest.fixture(scope="module")
def logits(run):
    model = run.load()
    return np.asarray(jax.jit(model.module.apply)(model.variables, IDS))


def assert_same(model, logits):
    assert model.tokenizer.encode_text(TEXT).ids == IDS[0].tolist()
    found = jax.jit(model.module.apply)(model.variables, IDS)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)


def test_only_rows_beside_the_adapters_are_trained_and_saved(run):
    assert run.summary["parameters"]["full"] == (3 + 2 + 2) * 20
    found = load_file(run.path / "adapter" / "adapter.safetensors")
    full = {name: array for name, array in found.items() if "lora_" not in name}
    assert {name: array.shape for name, array in full.items()} == {
        "params/embed/token_rows": (5, 20),
        "params/head/token_rows": (2, 20),
    }
    loaded = run.load()
    tokens = {"embed": (12, 14, 6, 43, 44), "head": (43, 44)}
    assert loaded.module.config.tokens_by_layer == tokens
    table = loaded.params["embed"]["embedding"][np.array(tokens["embed"])]
    moved = np.abs(full["params/embed/token_rows"] - table)
    assert (moved.max(axis=1) > 1e-3).all()
    assert token_table(loaded.module.token_rows()) == [
        ("embed", 1, "rows of 5 tokens", "45 x 20", "-", "-", 100),
        ("head", 1, "rows of 2 tokens", "20 x 45", "-", "-", 40),
    ]


def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "4")
    fine_tune(run.path, [f"output.dir={again}"], resume=True)
    assert adapter_of(again) == adapter_of(run.path)


def test_its_adapter_has_the_tokenizer(run):
    found = load_tokenizer(run.path / "adapter")
    assert found.encode_text(TEXT).ids == IDS[0].tolist()
    assert found.special.chat_template


def test_a_merged_model_has_them(run, logits, tmp_path, call):
    words = ("merge", "--adapter", run.path, "--out", tmp_path / "m")
    assert call(*words)[0] == 0
    assert_same(load_model(tmp_path / "m"), logits)


def test_an_export_comes_back_with_them(run, base, logits, tmp_path, call):
    words = ("--adapter", run.path, "--format", "peft", "--out", tmp_path / "p")
    assert call("export", *words)[0] == 0
    assert_same(load_model(base, tmp_path / "p"), logits)


def test_generation_with_a_cache_and_scores_are_those_of_the_whole(
    run, logits, tmp_path, call
):
    data, out = write(tmp_path / "d", [{"text": TEXT}]), tmp_path / "o"
    words = ("score", "--adapter", run.path, "--data", data, "--out", out)
    assert call(*words)[0] == 0
    [line] = [json.loads(text) for text in out.read_text().splitlines()]
    shifted = logits[0, :-1] - logits[0, :-1].max(axis=-1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(-1)) - shifted[range(6), IDS[0, 1:]]
    np.testing.assert_allclose(line["logprobs"], -nll, rtol=1e-4, atol=1e-5)
    words = ("generate", "--adapter", run.path, "--prompt", TEXT, "--json")
    code, text, _ = call(*words, "--max-new-tokens", 2)
    assert code == 0
    [result] = json.loads(text)["results"]
    assert result["input_ids"] == IDS[0].tolist()
    first, second = result["output_ids"]
    assert first == logits[0, -1].argmax()
    model = run.load()
    longer = jnp.append(IDS, jnp.array([[first]]), axis=1)
    whole = jax.jit(model.module.apply)(model.variables, longer)
    assert second == whole[0, -1].argmax()


def test_unknown_tokens_stop_a_run_before_it_starts(run, tmp_path):
    words = [f"output.dir={tmp_path}/x", "lora.tokens=[skies, 99]"]
    with pytest.raises(
        ValueError, match=r"'skies' is not a token .*99 must have a row"
    ):
        fine_tune(run.path / "config.yaml", words)
    assert not (tmp_path / "x" / "adapter").exists()
