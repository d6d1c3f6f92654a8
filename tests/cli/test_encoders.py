"""Encoders other than BERT are trained, and their adapters exported, by the command."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.golden import GOLDEN


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("xlm-roberta", "layer.0.attention.self.query"),
        ("modernbert", "layers.0.attn.Wqkv"),
    ],
)
def test_an_encoder_is_trained_and_exported(
    name, trained, config, model_dir, tmp_path, call
):
    base = shutil.copytree(GOLDEN / name, tmp_path / "base")
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
    factors = [tensor for key, tensor in tensors.items() if f"{trained}.lora_B" in key]
    assert len(factors) == 1
    assert factors[0].any()
