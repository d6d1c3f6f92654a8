"""`fine_tune` from Python: silent, resumable, and what `lora-jax train` writes."""

import json
import signal

import pytest
import yaml

from lora_jax import fine_tune
from lora_jax.finetune.encode import encode
from lora_jax.finetune.errors import Interrupted, UserError
from lora_jax.finetune.evaluation import evaluate_run
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import open_run
from lora_jax.finetune.settings import load_settings
from lora_jax.train.data import Batches, read_jsonl
from tests.tiny_decoder import make_decoder


class Recorder(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, text="", *, style=None):
        self.lines.append(text)


def adapter_of(folder):
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def tree(config, tmp_path_factory):
    """The config as a nested dictionary, with a folder of its own."""
    found = yaml.safe_load(config.read_text())
    found["train"]["learning_rate"] = 1e-2
    found["output"]["dir"] = str(tmp_path_factory.mktemp("api") / "run")
    return found


@pytest.fixture(scope="module")
def run(tree):
    return fine_tune(tree)


def test_it_prints_nothing_and_returns_the_metrics(tree, tmp_path, capfd):
    run = fine_tune(tree, [f"output.dir={tmp_path}/run", "train.max_steps=2"])
    assert capfd.readouterr() == ("", "")
    assert run.path == tmp_path / "run"
    assert run.summary == json.loads((run.path / "summary.json").read_text())
    assert run.summary["steps"] == 2
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines]
    assert run.metrics[-1]["split"] == "validation"
    assert run.settings == load_settings(run.path)
    assert run.prompt is None


def test_it_is_evaluated_and_encodes_in_silence(run, data_dir, capfd):
    found = evaluate_run(*open_run(run.path))
    assert found.metrics == pytest.approx(run.summary["test"], rel=1e-5)
    assert found.examples == 25
    path = str(data_dir / "test.jsonl")
    records = read_jsonl(path)
    lines, cut = encode(run.load(), records, path, batch_size=16)
    assert cut == 0
    hits = [
        ["bad", "good"][line["logits"].index(max(line["logits"]))] == record["label"]
        for line, record in zip(lines, records, strict=True)
    ]
    assert sum(hits) / len(hits) == run.summary["test"]["accuracy"]
    assert capfd.readouterr() == ("", "")


def test_a_file_settings_and_a_dictionary_are_the_same_run(config, tree, run, tmp_path):
    words = [f"output.dir={tmp_path}/run"]
    again = fine_tune(load_settings(config, words))
    assert adapter_of(again.path) == adapter_of(run.path)
    assert again.summary["test"] == run.summary["test"]
    assert fine_tune(again.path, resume=True).summary["test"] == run.summary["test"]


def test_ctrl_c_is_an_interrupt_that_says_how_to_resume(
    tree, run, tmp_path, monkeypatch
):
    words = [f"output.dir={tmp_path}/run"]
    batch_at = Batches.batch_at

    def interrupting(self, number):
        if self.shuffle and number == 15:  # while step 15 is taken
            signal.raise_signal(signal.SIGINT)
        return batch_at(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch_at", interrupting)
        with pytest.raises(Interrupted) as stop:
            fine_tune(tree, words)
    assert isinstance(stop.value, KeyboardInterrupt)
    assert stop.value.is_orderly
    assert str(stop.value) == (
        "interrupted. The checkpoint of step 15 is saved. Resume with\n"
        "  fine_tune(config, resume=True)"
    )
    reporter = Recorder()
    again = fine_tune(tree, words, resume=True, reporter=reporter)
    assert "Resuming at step 15 of 24" in reporter.lines
    assert adapter_of(again.path) == adapter_of(run.path)


def test_a_reporter_takes_in_what_is_said(tree, tmp_path):
    reporter = Recorder()
    fine_tune(
        tree,
        [f"output.dir={tmp_path}/run", "train.max_steps=1", "train.baseline=false"],
        reporter=reporter,
    )
    said = "\n".join(reporter.lines)
    assert "Adapted layers (6)" in said
    assert "encoder/layer_0/attention/query" in said
    assert "validation loss" in said
    assert "lora-jax" not in said  # commands are said by the command line


def test_an_error_on_the_way_says_what_is_saved(tree, tmp_path, monkeypatch):
    batch_at = Batches.batch_at

    def failing(self, number):
        if self.shuffle and number == 14:
            raise RuntimeError("the roof fell in")
        return batch_at(self, number)

    monkeypatch.setattr(Batches, "batch_at", failing)
    with pytest.raises(RuntimeError, match="roof") as caught:
        fine_tune(tree, [f"output.dir={tmp_path}/run"])
    assert "The checkpoint of step 12 is saved" in "".join(caught.value.__notes__)


def test_a_run_that_exists_is_kept_unless_it_is_resumed_or_overwritten(run, tree):
    with pytest.raises(UserError, match=r"already contains a run .*resume=True"):
        fine_tune(tree)
    with pytest.raises(ValueError, match="resume and overwrite must not both"):
        fine_tune(tree, resume=True, overwrite=True)
    short = fine_tune(tree, ["train.max_steps=1"], overwrite=True)
    assert short.summary["steps"] == 1


def test_a_decoder_says_how_it_is_prompted(tmp_path):
    folder = make_decoder(tmp_path / "llama")
    rows = [{"text": f"the sky is {word} ."} for word in ("blue", "red") * 4]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = fine_tune(
        {
            "model": {"path": folder},
            "data": {"train": data, "holdout": 0.25},
            "lora": {"rank": 1},
            "train": {"max_steps": 1, "batch_size": 4, "baseline": False},
            "output": {"dir": tmp_path / "run"},
        }
    )
    assert run.prompt == "text"
    assert set(run.summary["validation"]) == {"step", "loss"}
