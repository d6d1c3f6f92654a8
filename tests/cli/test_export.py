"""Adapters of other tools on the command line, in and out."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_jax.cli.export import vllm_command
from lora_jax.files.safetensors import open_tensors
from lora_jax.interop.peft import read_peft

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA, BERT = GOLDEN / "llama", GOLDEN / "bert"


def test_a_run_is_exported_without_its_head_or_not_at_all(run_dir, tmp_path, call):
    words = ("export", "--adapter", run_dir, "--format", "peft")
    code, _, shown = call(*words, "--out", tmp_path / "a")
    assert code == 2
    assert "on 'pooler' pooling" in shown
    assert "--skip-head" in shown
    code, out, _ = call(*words, "--skip-head", "--out", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "peft"
    found = read_peft(tmp_path / "a")
    ours = open_tensors(run_dir / "adapter" / "adapter.safetensors")
    name = "encoder.layer.0.attention.self.query"  # as the base opens without a head
    a = ours["lora/encoder/layer_0/attention/query/lora_a"]
    np.testing.assert_array_equal(found.modules[name].a, a.T)
    assert found.modules[name].scaling == 4.0
    assert found.full == {}


def test_a_peft_adapter_becomes_portable_and_mlx(tmp_path, call):
    adapter = LLAMA / "peft_rslora"
    words = ("export", "--adapter", adapter, "--model", LLAMA)
    code, out, _ = call(*words, "--portable", "--out", tmp_path / "p", "--json")
    assert code == 0
    assert json.loads(out)["portable"] is True
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert vllm_command(tmp_path / "p") == (
        "vllm serve llama --enable-lora --max-lora-rank 8 --lora-modules "
        f"p={tmp_path}/p"
    )
    code, shown, _ = call(*words, "--portable", "--out", tmp_path / "q")
    assert f"vllm serve {LLAMA} --enable-lora" in shown  # where it is on this machine
    assert f"--lora-modules q={tmp_path}/q" in shown
    code, *_ = call(*words, "--format", "mlx", "--out", tmp_path / "m")
    assert code == 0
    assert (tmp_path / "m" / "adapters.safetensors").is_file()
    code, _, shown = call(*words, "--out", tmp_path / "m")
    assert code == 2
    assert "exists and is not empty" in shown


def test_inspect_shows_a_peft_folder(call):
    code, out, _ = call("inspect", LLAMA / "peft_rslora", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tool"] == "PEFT"
    tensors = open_tensors(LLAMA / "peft_rslora" / "adapter_model.safetensors")
    assert found["trainable"] == sum(np.prod(s) for s in tensors.shapes.values())
    row = next(r for r in found["layers"] if r["path"].endswith("q_proj"))
    prefix = f"base_model.model.{row['path']}"
    a, b = (tensors[f"{prefix}.lora_{x}.weight"] for x in "AB")
    assert row["scaling"] == 1.5
    assert row["norm"] == pytest.approx(np.linalg.norm(1.5 * (b @ a)), rel=1e-5)
    code, shown, _ = call("inspect", LLAMA / "peft_rslora")
    assert code == 0
    assert "written by PEFT" in shown


def test_a_peft_adapter_is_merged_and_encodes(tmp_path, call):
    with np.load(BERT / "peft_reference.npz") as arrays:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        types, wanted = arrays["token_type_ids"], arrays["logits_saved"]
    rows = [i for i in range(len(ids)) if not types[i].any()]
    lines = [
        {"input_ids": ids[i].tolist(), "attention_mask": mask[i].tolist()} for i in rows
    ]
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = BERT / "peft_saved"
    code, *_ = call(
        *("merge", "--model", BERT, "--adapter", adapter, "--out", tmp_path / "m")
    )
    assert code == 0
    for words in (["--model", BERT, "--adapter", adapter], ["--model", tmp_path / "m"]):
        target = tmp_path / "out.jsonl"
        code, _, shown = call("encode", *words, "--data", data, "--out", target)
        assert code == 0, shown
        found = [json.loads(line) for line in target.read_text().splitlines()]
        assert len(found) == len(rows)
        for i, line in zip(rows, found, strict=True):
            np.testing.assert_allclose(line["logits"], wanted[i], atol=2e-4)


def test_a_decoder_is_merged(tmp_path, call):
    adapter = LLAMA / "peft_saved"
    words = ("--model", LLAMA, "--adapter", adapter, "--out", tmp_path / "m")
    code, out, _ = call("merge", *words, "--json")
    assert code == 0
    assert json.loads(out)["merge_error"] < 1e-5
    merged, saved = open_tensors(tmp_path / "m"), read_peft(adapter)
    np.testing.assert_array_equal(
        merged["lm_head.weight"], saved.full["lm_head.weight"]
    )


@pytest.mark.parametrize("command", [["merge"], ["export", "--format", "mlx"]])
def test_the_base_that_a_peft_folder_names_is_not_looked_for(
    command, tmp_path, call, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # not a folder here
    words = ("--adapter", LLAMA / "peft_plain", "--out", tmp_path / "m")
    code, _, shown = call(*command, *words)
    assert code == 2
    assert "an adapter of another tool" in shown
    assert "add --model" in shown
