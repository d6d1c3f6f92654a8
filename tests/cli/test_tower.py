"""A multimodal folder through the commands: its language model is trained."""

import contextlib
import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from tests.tiny_decoder import make_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("tower") / "gemma3", "gemma3_tower")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {"prompt": f"what is the {thing} ? ", "completion": f"{colour} ."}
        for thing, colour in answers.items()
    ] * 4
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "train.jsonl").write_text(lines)
    (place / "config.yaml").write_text(
        f"""
model: {{path: {folder}}}
data: {{train: {place}/train.jsonl, holdout: 0.25}}
lora: {{rank: 4, alpha: 16, targets: [q_proj, down_proj]}}
train: {{epochs: 12, batch_size: 6, learning_rate: 3e-2, eval_every: 24}}
output: {{dir: {place}/run}}
"""
    )
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["train", str(place / "config.yaml")]) == 0
    assert "vision_tower: 23 tensors stay on disk; text in, text out" in told.getvalue()
    return place / "run"


def test_it_is_trained_exported_and_merged(run, folder, call, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["loss"] < 0.5
    code, _, told = call("generate", "--adapter", run, "--prompt", "what is the sky ?")
    assert (code, "23 tensors stay on disk" in told) == (0, True)
    assert call("export", "--adapter", run, "--out", tmp_path / "peft")[0] == 0
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers."
    assert len(names) == 12
    assert all(name.startswith(prefix) for name in names)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    # The vision tower has a q_proj too: full names there, the last word elsewhere.
    layers = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert config["target_modules"] == ["down_proj", *layers]
    assert call("merge", "--adapter", run, "--out", tmp_path / "merged")[0] == 0
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {n for n, t in before.items() if not np.array_equal(t, after[n])}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in changed} == {
        "q_proj",
        "down_proj",
    }
    assert all(name.startswith("language_model.") for name in changed)
