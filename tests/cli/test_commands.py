"""Every command on a tiny model, from a run that was really trained."""

import json
import shutil

import numpy as np
import pytest

from lora_jax.files.adapter import load_adapter, save_adapter
from lora_jax.files.safetensors import open_tensors
from lora_jax.finetune.inspection import singular_values


def test_a_run_folder_holds_what_the_readme_says(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.yaml",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
    }
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 24  # two epochs of ceil(90 / 8)
    assert summary["examples"] == {"train": 90, "validation": 24, "test": 25}
    assert summary["test"]["accuracy"] >= 0.9  # one word decides
    assert 0 <= summary["baseline"]["test_accuracy"] <= 1
    # Rank 2: four 16 x 16 and two 16 x 32 kernels; a head of 16 x 2 + 2.
    assert summary["parameters"]["adapter"] == 2 * (4 * 32 + 2 * 48)
    assert summary["parameters"]["full"] == 34
    assert (
        summary["adapter_bytes"] <= 1.1 * 4 * summary["parameters"]["trainable"] + 8e3
    )
    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["split"] == "validation"]
    assert steps == [6, 12, 18, 24]
    best = max(
        (line for line in lines if line["split"] == "validation"),
        key=lambda line: line["accuracy"],
    )
    assert summary["validation"]["accuracy"] == best["accuracy"]
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_repeats_the_test_accuracy_of_the_run(run_dir, call):
    code, out, _ = call("eval", "--run", run_dir, "--json")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert code == 0
    assert json.loads(out)["accuracy"] == summary["test"]["accuracy"]
    assert json.loads(out)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    assert json.loads(out)["data"].endswith("/test.jsonl")


def test_eval_takes_the_config_of_a_run_and_other_data(config, data_dir, call):
    data = data_dir / "validation.jsonl"
    code, out, _ = call("eval", config, "--data", data, "--json")
    assert code == 0
    assert json.loads(out)["examples"] == 24


def test_eval_of_other_data_needs_none_of_the_runs(run_dir, data_dir, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("train.jsonl", "gone.jsonl"))
    data = data_dir / "validation.jsonl"
    code, out, shown = call("eval", "--run", folder, "--data", data, "--json")
    assert code == 0, shown
    assert json.loads(out)["examples"] == 24
    code, _, shown = call("eval", "--run", folder, "--split", "test", "--json")
    assert code == 0, shown


def test_eval_with_settings_that_are_not_the_runs_names_them(config, run_dir, call):
    code, _, shown = call("eval", config, "lora.rank=4", "train.keep=5")
    assert code == 2
    assert "lora.rank: 2" in shown
    assert "train.keep" not in shown
    assert f"Use --run {run_dir} to" in shown


def test_eval_of_the_base_repeats_the_baseline(run_dir, call):
    code, out, _ = call("eval", "--run", run_dir, "--base", "--json")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert code == 0
    assert json.loads(out)["accuracy"] == summary["baseline"]["test_accuracy"]


def test_plan_counts_targets_and_prices_a_step(config, call):
    code, out, shown = call("plan", config, "--json")
    plan = json.loads(out)
    assert code == 0
    assert len(plan["targets"]) == 6
    assert sum(t["trainable"] for t in plan["targets"]) == 448
    lora, full = plan["step"]["lora"], plan["step"]["full"]
    assert lora["trained"] == 4 * (448 + 34)
    assert lora["optimizer"] < full["optimizer"]
    assert min(lora["flops"], full["flops"]) > 0
    assert "full fine-tuning" in shown
    assert plan["steps"] == {"total": 24, "per_epoch": 12}


def test_a_run_says_that_it_needs_what_was_planned(run_dir, config, call):
    _, out, _ = call("plan", config, "--json")
    planned = json.loads(out)["step"]["lora"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert planned.pop("flops") > 0
    assert summary["memory_bytes"] == planned


def test_plan_prints_for_people_without_json(config, call):
    code, out, shown = call("plan", config, "lora.targets=[query]")
    assert code == 0
    assert "encoder/layer_0/attention/query" in out
    assert shown == ""


@pytest.fixture
def lines_file(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(
        '{"text": "the film is lovely"}\n'
        '{"input_ids": [2, 14, 15, 17, 4, 3]}\n'
        '{"input_ids": [2, 14, 15, 17, 4, 3, 0, 0],'
        ' "attention_mask": [1, 1, 1, 1, 1, 1, 0, 0]}\n'
        '{"text": "a"}\n'
    )
    return file


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_encode_gives_a_line_for_a_line_and_ignores_padding(
    run_dir, lines_file, tmp_path, call
):
    target = tmp_path / "out.jsonl"
    code, out, _ = call(
        "encode", "--adapter", run_dir, "--data", lines_file, "--out", target, "--json"
    )
    assert code == 0
    assert json.loads(out)["lines"] == 4
    lines = read_lines(target)
    assert [len(line["embedding"]) for line in lines] == [16] * 4
    assert [len(line["logits"]) for line in lines] == [2] * 4
    np.testing.assert_allclose(lines[1]["embedding"], lines[2]["embedding"], rtol=1e-5)


def test_encode_without_an_adapter_has_no_logits(model_dir, lines_file, tmp_path, call):
    target = tmp_path / "out.jsonl"
    code, *_ = call(
        "encode", "--model", model_dir, "--data", lines_file, "--out", target
    )
    assert code == 0
    assert all(set(line) == {"embedding"} for line in read_lines(target))


@pytest.mark.filterwarnings("default:the head was trained on")
def test_a_merged_folder_encodes_as_the_adapter_does(
    run_dir, lines_file, tmp_path, call
):
    merged = tmp_path / "merged"
    code, out, shown = call("merge", "--adapter", run_dir, "--out", merged, "--json")
    assert code == 0
    assert "'mean' pooling, and transformers feeds it 'pooler'" in shown
    assert json.loads(out)["merge_error"] < 1e-4
    assert json.loads(out)["has_head"]
    results = []
    for words in (["--adapter", run_dir], ["--model", merged]):
        target = tmp_path / "out.jsonl"
        call("encode", *words, "--data", lines_file, "--out", target)
        results.append(read_lines(target))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-4, atol=1e-5)
    code, *_, shown = call("merge", "--adapter", run_dir, "--out", merged)
    assert code == 2
    assert "exists and is not empty" in shown


def test_inspect_gives_the_norm_of_each_update(run_dir, call):
    code, out, _ = call("inspect", run_dir, "--json")
    assert code == 0
    row = json.loads(out)["layers"][0]
    tensors = open_tensors(run_dir / "adapter" / "adapter.safetensors")
    a, b = (tensors[f"lora/{row['path']}/lora_{x}"] for x in "ab")
    assert row["scaling"] == 4.0
    assert row["norm"] == pytest.approx(np.linalg.norm(4.0 * (a @ b)), rel=1e-5)
    assert row["top"] == pytest.approx(np.linalg.norm(4.0 * (a @ b), 2), rel=1e-5)


def test_inspect_counts_nan_where_loading_refuses(run_dir, tmp_path, call):
    found = load_adapter(run_dir / "adapter")
    save_adapter(tmp_path / "a", found.variables, found.config, found.fingerprint)
    file = tmp_path / "a" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    file.write_bytes(content)
    code, out, _ = call("inspect", tmp_path / "a", "--json")
    assert code == 0
    assert list(json.loads(out)["not_finite"].values()) == [1]


def test_inspect_reads_a_model_folder(model_dir, call):
    code, out, _ = call("inspect", model_dir, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "model"
    assert found["parameters"] == sum(np.prod(t["shape"]) for t in found["tensors"])
    assert found["not_finite"] == {}


def test_singular_values_are_those_of_the_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((3, 5))
    wanted = np.linalg.svd(0.5 * a @ b, compute_uv=False)[:3]
    np.testing.assert_allclose(singular_values(a, b, scaling=0.5), wanted, rtol=1e-10)


MODEL_AND_OUT = ("--model", "{bert}", "--out", "{tmp}/o")


def peft_folder(path):
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "{tmp}/none"], "must be a folder or"),
        (["inspect", "{tmp}"], "is not a run folder (config.yaml), adapter folder"),
        (["eval"], "either a CONFIG or --run DIR"),
        (["eval", "--run", "{tmp}"], "is not a run folder: it has no config.yaml"),
        (["eval", "--run", "{run}", "--data", "{tmp}/no.jsonl"], "no.jsonl must exist"),
        (["eval", "--run", "{run}", "--data", "{tmp}/bad.jsonl"], "bad.jsonl:2:"),
        (
            ["merge", "--adapter", "{peft}", "--model", "{bert}", "--out", "{tmp}/m"],
            "target_modules must name the adapted modules",
        ),
        (["merge", "--adapter", "{tmp}/no", "--out", "{tmp}/m"], "no adapter at"),
        (
            ["encode", "--data", "{tmp}/bad.jsonl", "--out", "{tmp}/o"],
            "'text' must be a string; got 3",
        ),
        (
            ["encode", "--data", "{tmp}/ok.jsonl", "--out", "{tmp}/o"],
            "--model is missing",
        ),
        (
            ["encode", "--data", "{tmp}/ok.jsonl", "--out", "{tmp}/no/o"],
            "/no does not exist",
        ),
        (
            ["encode", "--data", "{tmp}/ids.jsonl", *MODEL_AND_OUT],
            "ids must be in [0, 22); got 99 to 99",
        ),
        (
            ["encode", "--data", "{tmp}/image.jsonl", *MODEL_AND_OUT],
            "image.jsonl: example 1: the model reads text",
        ),
    ],
)
def test_bad_input_exits_with_2_and_says_why(
    words, message, run_dir, model_dir, tmp_path, call
):
    (tmp_path / "ok.jsonl").write_text('{"text": "a film"}\n')
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [99]}\n')
    (tmp_path / "image.jsonl").write_text('{"image": "x.png"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "bad"}\n{"text": 3}\n')
    places = {"tmp": tmp_path, "run": run_dir, "bert": model_dir}
    if "{peft}" in words:
        places["peft"] = peft_folder(tmp_path / "peft")
    code, out, shown = call(*[word.format(**places) for word in words])
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown
    assert out == ""


def test_inspect_for_programs_prints_json_and_nothing_else(run_dir, call):
    code, out, shown = call("inspect", run_dir, "--json")
    assert code == 0
    assert len(json.loads(out)["layers"]) == 6
    assert shown == ""
