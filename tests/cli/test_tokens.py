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
from lora_jax.finetune.evaluation import evaluate_run
from lora_jax.finetune.report import token_table
from lora_jax.finetune.run_folder import open_run
from tests.cli.test_language import write
from tests.finetune.test_run import adapter_of
from tests.tiny_decoder import make_decoder

IDS = jnp.array([[15, 10, 11, 12, 6, 14]])
NAMES = ["sky", "sea"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("tokens")
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {"prompt": f"what is the {thing} ? ", "completion": f"{colour} ."}
        for thing, colour in answers.items()
    ] * 4
    file = str(write(place / "train.jsonl", rows))
    lora = {"rank": 2, "targets": ["q_proj"], "tokens": [*NAMES, 6]}
    steps = {
        "batch_size": 2,
        "epochs": 2,
        "max_steps": 4,
        "eval_every": 2,
        "learning_rate": 0.1,
    }
    tree = {
        "model": {"path": str(base)},
        "data": {"train": file, "packing": True, "max_length": 24, "holdout": 0.25},
        "lora": lora,
        "train": {**steps, "baseline": False, "samples": ["what is the sky ? "]},
        "output": {"dir": str(place / "run")},
    }
    return fine_tune(tree)


@pytest.fixture(scope="module")
def logits(run):
    model = run.load()
    return np.asarray(jax.jit(model.module.apply)(model.variables, IDS))


def test_only_the_rows_beside_the_adapters_are_trained_and_saved(run):
    assert run.summary["parameters"]["full"] == 3 * 20
    found = load_file(run.path / "adapter" / "adapter.safetensors")
    full = {name: array for name, array in found.items() if "lora_" not in name}
    assert {name: array.shape for name, array in full.items()} == {
        "params/embed/token_rows": (3, 20)
    }
    table = load_model(run.settings.model.path).params["embed"]["embedding"]
    moved = np.abs(full["params/embed/token_rows"] - table[np.array([12, 14, 6])])
    assert (moved.max(axis=1) > 1e-3).all()
    assert run.load().module.config.tokens_by_layer == {"embed": (12, 14, 6)}


def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "4")
    fine_tune(run.path, [f"output.dir={again}"], resume=True)
    assert adapter_of(again) == adapter_of(run.path)


def test_the_table_of_targets_shows_the_rows(run):
    row = ("embed", 1, "rows of 3 tokens", "43 x 20", "-", "-", 60)
    assert token_table(run.load().module.token_rows()) == [row]


def test_a_merged_model_has_them(run, base, logits, tmp_path, call):
    words = ("--model", base, "--adapter", run.path, "--out", tmp_path / "m")
    assert call("merge", *words)[0] == 0
    model = load_model(tmp_path / "m")
    found = jax.jit(model.module.apply)(model.variables, IDS)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)


def test_an_export_comes_back_with_them(run, base, logits, tmp_path, call):
    words = ("--adapter", run.path, "--format", "peft", "--out", tmp_path / "p")
    assert call("export", *words)[0] == 0
    model = load_model(base, tmp_path / "p")
    found = jax.jit(model.module.apply)(model.variables, IDS)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache_and_scores_are_those_of_the_whole(
    run, base, logits, tmp_path, call
):
    words = ("--model", base, "--adapter", run.path)
    data, out = write(tmp_path / "d", [{"input_ids": IDS[0].tolist()}]), tmp_path / "o"
    assert call("score", *words, "--data", data, "--out", out)[0] == 0
    [line] = [json.loads(text) for text in out.read_text().splitlines()]
    shifted = logits[0, :-1] - logits[0, :-1].max(axis=-1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(-1)) - shifted[range(5), IDS[0, 1:]]
    np.testing.assert_allclose(line["logprobs"], -nll, rtol=1e-4, atol=1e-5)
    prompt = "what is the sky ? sea"
    code, text, _ = call(
        "generate", *words, "--prompt", prompt, "--max-new-tokens", 2, "--json"
    )
    assert code == 0
    [result] = json.loads(text)["results"]
    first, second = result["output_ids"]
    assert result["input_ids"] == IDS[0].tolist()
    assert first == logits[0, -1].argmax()
    model = run.load()
    longer = jnp.append(IDS, jnp.array([[first]]), axis=1)
    whole = jax.jit(model.module.apply)(model.variables, longer)
    assert second == whole[0, -1].argmax()


def test_new_tokens_are_in_the_adapter_and_all_that_is_made_of_it(
    run, base, tmp_path, call
):
    data = write(tmp_path / "d", [{"text": "<tool> sky </tool> ."}] * 6)
    words = [f"data.train={data}", "data.packing=false", "lora.tokens=[]"]
    words += [f"output.dir={tmp_path}/run", "model.add_tokens=[<tool>, </tool>]"]
    done = fine_tune(run.path / "config.yaml", [*words, "train.samples=[]"])
    assert done.summary["parameters"]["full"] == 4 * 20
    ids = [43, 12, 44, 5]
    for folder in (done.path / "adapter", tmp_path / "p", tmp_path / "m"):
        if folder.name == "p":
            command = ("export", "--adapter", done.path, "--format", "peft")
            assert call(*command, "--out", folder)[0] == 0
        if folder.name == "m":
            assert call("merge", "--adapter", done.path, "--out", folder)[0] == 0
        found = load_tokenizer(folder)
        assert found.encode_text("<tool> sky </tool> .").ids == ids
        assert found.special.chat_template
    model, merged = done.load(), load_model(tmp_path / "m")
    exported = load_model(base, tmp_path / "p")
    logits = jax.jit(model.module.apply)(model.variables, jnp.array([ids]))
    for other in (merged, exported):
        found = jax.jit(other.module.apply)(other.variables, jnp.array([ids]))
        np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    loss = evaluate_run(*open_run(done.path), split="validation").metrics["loss"]
    assert loss == pytest.approx(done.summary["validation"]["loss"], rel=1e-5)


def test_unknown_tokens_stop_a_run_before_it_starts(run, tmp_path):
    words = [f"output.dir={tmp_path}/x", "lora.tokens=[skies, 99]"]
    with pytest.raises(
        ValueError, match=r"'skies' is not a token .*99 must have a row"
    ):
        fine_tune(run.path / "config.yaml", words)
    assert not (tmp_path / "x" / "adapter").exists()
