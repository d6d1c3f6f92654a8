"""A hybrid through the commands: packed, trained, resumed, talked to, exported."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from tests.tiny_decoder import make_decoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("hybrid")
    folder = make_decoder(place / "model", "qwen3_5")
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {"prompt": f"what is the {thing} ? ", "completion": f"{colour} ."}
        for thing, colour in answers.items()
    ] * 8
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "train.jsonl").write_text(lines)
    (place / "config.yaml").write_text(
        f"""
model: {{path: {folder}}}
data: {{train: {place}/train.jsonl, packing: true, max_length: 24}}
lora: {{rank: 4, alpha: 16, targets: [in_proj_qkv, q_proj, down_proj]}}
train:
  epochs: 20
  baseline: false
  batch_size: 4
  learning_rate: 3e-2
  eval_every: 20
output: {{dir: {place}/run}}
"""
    )
    assert main(["train", str(place / "config.yaml")]) == 0
    return place / "run"


def test_packed_rows_are_learned_and_answered(run, call):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.25 < 1 < losses[0]
    asked = ["--prompt", "what is the sky ?", "--prompt", "what is the grass ?"]
    code, out, told = call("generate", "--adapter", run, *asked, "--json")
    assert code == 0, told
    assert [r["text"] for r in json.loads(out)["results"]] == ["blue .", "green ."]


def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path, call):
    again = shutil.copytree(run, tmp_path / "run")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "40")
    words = ["--resume", f"output.dir={again}"]
    code, out, shown = call("train", run.parent / "config.yaml", *words)
    assert code == 0, shown
    assert "Resuming at step 20 of 40" in out
    kept, resumed = (
        load_file(folder / "adapter" / "adapter.safetensors") for folder in (run, again)
    )
    assert kept.keys() == resumed.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_the_export_names_the_mixers_weights_as_peft_does(run, call, tmp_path):
    assert call("export", "--adapter", run, "--out", tmp_path / "peft")[0] == 0
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    layers = "base_model.model.model.language_model.layers"
    assert f"{layers}.0.linear_attn.in_proj_qkv.lora_A.weight" in names
    assert f"{layers}.1.self_attn.q_proj.lora_B.weight" in names
