"""A decoder through every command: trained, evaluated, scored, and talked to."""

import json
import shutil

import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.cli.train import shortest
from lora_jax.files.adapter import _digest
from lora_jax.finetune import pricing
from tests.models.golden import GOLDEN
from tests.tiny_decoder import WORDS, make_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("decoder") / "llama")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("language")
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {"prompt": f"what is the {thing} ? ", "completion": f"{colour} ."}
        for thing, colour in answers.items()
    ] * 8
    write(place / "train.jsonl", rows)
    write(place / "test.jsonl", rows[:3])
    file = place / "config.yaml"
    file.write_text(
        f"""
model: {{path: {folder}}}
data: {{train: {place}/train.jsonl, test: {place}/test.jsonl, holdout: 0.25}}
lora: {{rank: 4, alpha: 16}}
train:
  epochs: 12
  batch_size: 6
  learning_rate: 3e-2
  eval_every: 12
  samples:
    - "what is the sky ? "
    - [{{role: system, content: "red ."}}, {{role: user, content: "what is ?"}}]
output: {{dir: {place}/run}}
"""
    )
    return file


@pytest.fixture(scope="module")
def run(config):
    assert main(["train", str(config)]) == 0
    return config.parent / "run"


def test_a_decoder_learns_its_answers_and_says_so(run, call):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "loss"
    assert summary["examples"] == {"train": 18, "validation": 6, "test": 3}
    assert summary["test"]["loss"] < 0.1 < summary["baseline"]["test_loss"]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line["split"] == "sample"]
    assert samples[-2]["text"] == "blue ."
    assert samples[-1]["prompt"] == "what is ?"
    assert any("targets_per_second" in line for line in lines)
    code, out, _ = call("eval", "--run", run, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    code, out, _ = call("eval", "--run", run, "--base", "--json")
    assert json.loads(out)["loss"] == pytest.approx(summary["baseline"]["test_loss"])


def test_the_adapter_is_talked_to(run, folder, call):
    words = ["--adapter", run, "--prompt", "what is the grass ?"]
    code, out, shown = call("generate", *words, "--json")
    assert code == 0, shown
    result = json.loads(out)["results"][0]
    assert result["text"] == "green ."
    assert result["stopped_by"] == "stop token"
    assert [WORDS[i] for i in result["output_ids"]] == ["green", "."]
    code, out, _ = call("generate", *words, "--stop", ".")
    assert out == "green \n"
    code, out, _ = call(
        "generate", *words, "--prompt", "what is the sky ?", "--model", folder
    )
    assert out.count("green .") == out.count("blue .") == 1


@pytest.mark.slow
def test_a_run_on_a_base_that_was_cast_is_used_like_any_other(config, tmp_path, call):
    run, merged = tmp_path / "run", tmp_path / "merged"
    words = ["model.param_dtype=bfloat16", "train.max_steps=2", f"output.dir={run}"]
    code, _, shown = call("train", config, *words)
    assert code == 0, shown
    adapter, prompt = ["--adapter", run], "what is the sky ?"
    data = write(tmp_path / "in.jsonl", [{"text": prompt}])
    for command in (
        ["generate", *adapter, "--prompt", prompt],
        ["score", *adapter, "--data", data, "--out", tmp_path / "out.jsonl"],
        ["merge", *adapter, "--out", merged],
    ):
        code, _, shown = call(*command)
        assert code == 0, shown
    file = run / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    assert said["extra"]["param_dtype"] == "bfloat16"
    said["extra"]["param_dtype"] = "int8"
    said["config_sha256"] = _digest(said)
    file.write_text(json.dumps(said))
    code, _, shown = call("generate", *adapter, "--prompt", prompt)
    assert code == 2
    assert "param_dtype of extra must be null or one of" in shown


def test_a_chat_is_put_into_the_template(folder, call):
    options = ["--model", folder, "--max-new-tokens", 3, "--json"]
    _, out, _ = call("generate", "--chat", "--prompt", "the sky", *options)
    chat = json.loads(out)["results"][0]
    shown = "user the sky </s> assistant"
    assert [WORDS[i] for i in chat["input_ids"]] == shown.split()
    _, out, _ = call("generate", "--prompt", shown, *options)
    assert json.loads(out)["results"][0]["output_ids"] == chat["output_ids"]
    sampled = ["--temperature", 2.0, "--seed"]
    texts = []
    for seed in (1, 1, 2):
        words = ["generate", "--prompt", shown, *options, *sampled, seed]
        texts.append(json.loads(call(*words)[1])["results"])
    assert texts[0] == texts[1] != texts[2]


def test_a_model_of_chats_is_asked_in_its_template(config, tmp_path, call):
    answers = {"sky": "blue", "grass": "green", "sea": "blue"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is the {thing} ?"},
                {"role": "assistant", "content": f"{colour} ."},
            ]
        }
        for thing, colour in answers.items()
    ] * 8
    write(tmp_path / "chats.jsonl", rows)
    code, out, shown = call(
        *("train", config, f"data.train={tmp_path}/chats.jsonl", "data.test=null"),
        f"output.dir={tmp_path}/run",
    )
    assert code == 0, shown
    run = shortest(tmp_path / "run")
    assert f"generate --adapter {run} --chat --prompt TEXT" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    samples = [x for x in map(json.loads, lines) if x["split"] == "sample"]
    assert samples[-2]["prompt"] == "what is the sky ? "
    assert samples[-2]["text"] == "blue ."
    assert samples[-1]["prompt"] == "what is ?"


def test_scores_are_the_log_probabilities_of_the_tokens(folder, tmp_path, call):
    arrays = np.load(GOLDEN / "llama" / "reference.npz")
    ids, logits = arrays["input_ids"][0], arrays["logits"][0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = log_p[np.arange(len(ids) - 1), ids[1:]]
    data = write(
        tmp_path / "in.jsonl",
        [{"input_ids": ids.tolist()}, {"text": "the sky is blue"}, {"input_ids": [3]}],
    )
    words = ["--model", folder, "--data", data, "--out", tmp_path / "o"]
    code, _, _ = call("score", *words)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [len(ids), 4, 1]
    np.testing.assert_allclose(rows[0]["logprobs"], wanted, rtol=1e-4, atol=1e-4)
    assert rows[0]["sum"] == pytest.approx(sum(rows[0]["logprobs"]))
    assert rows[2] == {"tokens": 1, "logprobs": [], "sum": 0.0}


def test_packing_and_patience(config, tmp_path, call):
    code, _, shown = call(
        *("train", config, f"output.dir={tmp_path}/run", "data.packing=true"),
        *("data.max_length=32", "train.patience=2", "train.learning_rate=1e-30"),
        *("train.eval_every=1", "train.epochs=30", "train.samples=[]"),
    )
    assert code == 0, shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] < 30
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [
        line["loss"] for line in map(json.loads, lines) if line["split"] == "validation"
    ]
    assert losses[-2:] == sorted(losses[-2:]) or losses[-1] >= min(losses[:-2])
    assert min(losses) == summary["validation"]["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets=[q_prj]"], "Did you mean: layers/attention/query"),
        (["data.max_length=3"], "it cuts off all of them in 24 examples"),
        (["data.packing=1"], "data.packing: must be a valid boolean"),
        (
            ["model.remat=full"],
            "must be 'auto', 'none', 'lora' or 'block'",
        ),
    ],
)
def test_bad_settings_of_a_decoder_are_refused(words, message, config, tmp_path, call):
    code, _, shown = call("train", config, *words, f"output.dir={tmp_path}/run")
    assert code == 2
    assert message in shown


def test_bad_requests_are_refused(folder, tmp_path, call):
    bad = write(tmp_path / "bad.jsonl", [{"text": 3}, {"input_ids": [1], "text": "a"}])
    ids = write(tmp_path / "ids.jsonl", [{"input_ids": [1, 99]}])
    long = write(tmp_path / "long.jsonl", [{"input_ids": [1] * 5000}])
    out = ["--out", tmp_path / "o"]
    for words, message in (
        (["score", "--data", bad, *out], "'text' must be a string; got 3"),
        (["score", "--data", ids, *out], "ids must be in [0, 43); got 1 to 99"),
        (["score", "--data", long, *out], "the model's context; got 5000"),
        (["generate", "--prompt", ""], "prompt 0 has no token"),
        (["generate", "--prompt", "a", "--top-p", 2], "top_p must be in (0, 1]; got 2"),
        (["generate", "--prompt", "a", "--max-new-tokens", 9999], "exceed the model's"),
    ):
        code, _, shown = call(*words, "--model", folder)
        assert code == 2
        assert message in shown


def test_an_encoder_neither_generates_nor_scores(model_dir, call):
    code, _, shown = call("generate", "--model", model_dir, "--prompt", "a")
    assert code == 2
    assert "must be a decoder; it is an encoder" in shown


def test_settings_of_encoders_are_refused_for_a_decoder(config, tmp_path, call):
    words = ["train.label_smoothing=0.1", f"output.dir={tmp_path}/run"]
    code, _, shown = call("train", config, *words)
    assert code == 2
    assert "train.label_smoothing must be 0 for a decoder" in shown


def test_eval_of_a_file_needs_no_training_data(run, config, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("train.jsonl", "gone.jsonl"))
    data = config.parent / "test.jsonl"
    code, _, shown = call("eval", "--run", folder, "--data", data, "--json")
    assert code == 0, shown


def test_auto_takes_the_first_policy_that_fits_as_plan_does(
    config, tmp_path, call, monkeypatch
):
    words = [config, "train.max_steps=2", "train.baseline=false", "train.samples=[]"]
    needed = {}
    for remat in ("lora", "block"):
        code, out, shown = call("plan", *words, f"model.remat={remat}", "--json")
        assert code == 0, shown
        needed[remat] = json.loads(out)["step"]["lora"]["total"]
    assert needed["lora"] > needed["block"]
    folder = tmp_path / "run"
    for remat in ("lora", "block"):
        code, out, shown = call(
            "train", *words, f"output.dir={folder}", "--json", "--overwrite"
        )
        assert code == 0, shown
        assert json.loads(out)["memory_bytes"]["total"] == needed[remat]
        limit = needed["lora"] - 1
        monkeypatch.setattr(pricing, "device_memory", lambda device, n=limit: n)
    code, out, _ = call("plan", *words)
    assert code == 0
    assert "with remat block\n" in out  # nothing to set
    shutil.rmtree(folder)
    explicit = [*words, f"output.dir={folder}", "model.remat=lora"]
    code, _, shown = call("train", *explicit)
    assert code == 2
    assert "with remat lora; this machine has" in shown
    assert "With model.remat=block it fits: " in shown
    assert not folder.exists()
    code, out, _ = call("plan", *explicit)
    assert code == 0
    assert "with remat block: set model.remat=block" in out
