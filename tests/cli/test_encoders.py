"""Encoders other than BERT are trained, and their adapters exported, by the command."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file

from tests.models.golden import GOLDEN


def test_an_encoder_is_trained_and_exported(config, model_dir, tmp_path, call):
    base = shutil.copytree(GOLDEN / "modernbert", tmp_path / "base")
    shutil.copy(model_dir / "tokenizer.json", base)
    run = tmp_path / "run"
    code, _, said = call(
        *("train", config, f"model.path={base}", f"output.dir={run}"),
        *("train.epochs=1", "lora.targets=all-linear"),
    )
    assert code == 0, said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == -(-90 // 8)
    assert np.isfinite(summary["validation"]["loss"])

    out = tmp_path / "peft"
    code, _, said = call("export", "--adapter", run, "--out", out, "--skip-head")
    assert code == 0, said
    tensors = load_file(out / "adapter_model.safetensors")
    end = "layers.0.attn.Wqkv.lora_B"
    factors = [tensor for key, tensor in tensors.items() if end in key]
    assert len(factors) == 1
    assert factors[0].any()


def test_a_decoder_encodes_with_a_prompt_and_does_not_score(tmp_path, call):
    base = GOLDEN / "sentence" / "qwen3_embedding"
    golden = np.load(base / "reference.npz", allow_pickle=False)
    data, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    data.write_text(
        "".join(json.dumps({"text": str(t)}) + "\n" for t in golden["texts"])
    )
    words = ("--model", base, "--data", data, "--out", out)
    code, shown, _ = call("encode", *words, "--prompt", "query")
    assert code == 0
    assert "each an embedding of 20, in" in shown
    found = [json.loads(line)["embedding"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(found, golden["with_prompt"], rtol=1e-5, atol=2e-5)
    out.unlink()
    code, _, said = call("score", *words)
    assert code == 2
    assert "must predict tokens; it makes embeddings only" in said
