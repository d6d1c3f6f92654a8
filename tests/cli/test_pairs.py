"""An encoder–decoder through every command: trained, resumed, scored, asked, merged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli.main import main
from lora_jax.interop.pretrained import load_model
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN

ANSWERS = {"sky": "blue .", "grass": "green .", "sea": "blue red"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a T5 and its tokenizer, examples, and the settings of a run."""
    place = tmp_path_factory.mktemp("pairs")
    shutil.copytree(
        GOLDEN / "t5", place / "t5", ignore=shutil.ignore_patterns("peft_*", "*.npz")
    )
    tensors = load_file(place / "t5" / "model.safetensors")
    tensors["shared.weight"] *= 16  # tied and scaled: else no logit could be large
    save_file(tensors, place / "t5" / "model.safetensors", {"format": "pt"})
    rows = [
        {"prompt": f"what is the {thing}?", "completion": answer}
        for thing, answer in ANSWERS.items()
    ] * 4
    write(place / "train.jsonl", rows)
    write(place / "test.jsonl", rows[:3])
    (place / "config.yaml").write_text(
        f"""
model: {{path: {place}/t5}}
data: {{train: {place}/train.jsonl, test: {place}/test.jsonl, holdout: 0.25}}
lora: {{rank: 4, alpha: 16, targets: [q, v]}}
train:
  epochs: 24
  batch_size: 3
  learning_rate: 3e-2
  eval_every: 36
  samples: ["what is the sky?"]
output: {{dir: {place}/run}}
"""
    )
    return place


@pytest.fixture(scope="module")
def run(place):
    assert main(["train", str(place / "config.yaml")]) == 0
    return place / "run"


def test_it_learns_its_answers_and_gives_them(run, call):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["examples"] == {"train": 9, "validation": 3, "test": 3}
    assert summary["test"]["loss"] < 0.1 < summary["baseline"]["test_loss"]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line["split"] == "sample"]
    assert samples[-1]["text"] == "blue ."
    words = [w for thing in ANSWERS for w in ("--prompt", f"what is the {thing}?")]
    code, out, shown = call("generate", "--adapter", run, *words, "--json")
    assert code == 0, shown
    results = json.loads(out)["results"]
    assert [found["text"] for found in results] == [*ANSWERS.values()]
    assert results[0]["input_ids"] == [4, 5, 6, 7, 21, 1]
    assert results[0]["stopped_by"] == "stop token"


def test_a_stopped_run_resumes_to_the_same_bits(place, run, tmp_path, call):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / "summary.json").unlink()
    steps = sorted((again / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.rmtree(steps[-1])
    words = ["--resume", f"output.dir={again}"]
    code, out, shown = call("train", place / "config.yaml", *words)
    assert code == 0, shown
    assert "Resuming at step 36 of 72" in out
    kept, resumed = (
        load_file(folder / "adapter" / "adapter.safetensors") for folder in (run, again)
    )
    assert kept.keys() == resumed.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_completions_are_scored_and_prompts_encoded(place, run, tmp_path, call):
    rows = [
        {"prompt": "what is the sky?", "completion": "blue ."},
        {"input_ids": [4, 5, 6, 7, 21, 1], "labels": [10, 3, 22, 1]},
        {"prompt": "what is the sky? the sky", "completion": "red"},
    ]
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = ["--adapter", run, "--data", data, "--out", out, "--batch-size", 2]
    code, _, shown = call("score", *words)
    assert code == 0, shown
    text, ids, worse = (json.loads(line) for line in out.read_text().splitlines())
    assert text["tokens"] == len(text["logprobs"]) == 4
    np.testing.assert_allclose(text["logprobs"], ids["logprobs"], atol=1e-6)
    assert text["sum"] > -1 > worse["sum"]

    words[-3] = out.with_name("vectors.jsonl")
    (tmp_path / "texts.jsonl").write_text('{"text": "the sky"}\n{"text": "sea"}\n')
    words[3] = tmp_path / "texts.jsonl"
    code, _, shown = call("encode", *words)
    assert code == 0, shown
    first = json.loads(words[-3].read_text().splitlines()[0])
    assert len(first["embedding"]) == 10


def test_it_is_merged_and_exported(place, run, tmp_path, call):
    merged, peft = tmp_path / "merged", tmp_path / "peft"
    code, _, shown = call("merge", "--adapter", run, "--out", merged)
    assert code == 0, shown
    new, old = (
        load_file(folder / "model.safetensors") for folder in (merged, place / "t5")
    )
    assert new.keys() == old.keys()
    changed = {n.split(".")[-2] for n in old if not np.array_equal(new[n], old[n])}
    assert changed == {"q", "v"}
    code, _, shown = call("export", "--adapter", run, "--out", peft)
    assert code == 0, shown
    config = json.loads((peft / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert config["target_modules"] == ["q", "v"]
    again, own = (load_model(place / "t5", folder) for folder in (peft, run))
    for path, array in flatten(own.variables["lora"]).items():
        np.testing.assert_array_equal(array, flatten(again.variables["lora"])[path])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["data.packing=true"], "data.packing must be false for an encoder–decoder"),
        (["train.label_smoothing=0.1"], "train.label_smoothing must be 0 for a deco"),
        (["data.train={place}/texts.jsonl"], "must hold prompt and completion; or inp"),
        (["data.train={place}/odd.jsonl"], "has an unknown key, 'complet'; did you"),
    ],
    ids=["packing", "smoothing", "texts", "keys"],
)
def test_settings_and_data_of_other_models_are_errors(place, call, words, error):
    write(place / "texts.jsonl", [{"text": "the sky"}])
    write(place / "odd.jsonl", [{"prompt": "a", "completion": "b", "complet": "c"}])
    given = [word.format(place=place) for word in words]
    where = f"output.dir={place}/other"
    code, _, shown = call("train", place / "config.yaml", *given, where)
    assert code == 2
    assert error in shown


def test_chats_are_an_error(place, call):
    words = ["--model", place / "t5", "--chat", "--prompt", "sky"]
    code, _, shown = call("generate", *words)
    assert code == 2
    assert "it is an encoder–decoder, which answers plain text: use --prompt" in shown
