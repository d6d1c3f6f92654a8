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
