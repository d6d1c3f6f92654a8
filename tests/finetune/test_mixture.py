"""A run on a mixture of experts, from settings to an adapter that PEFT reads."""

import json

import pytest

from lora_jax.cli.main import main
from tests.models.golden import GOLDEN


@pytest.mark.slow
def test_experts_are_trained_and_exported(tmp_path, capsys):
    data, config = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    lines = [{"input_ids": [3 + (i + j) % 40 for j in range(9)]} for i in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, out = tmp_path / "run", tmp_path / "peft"
    config.write_text(
        f"output: {{dir: {run}}}\n"
        f"model: {{path: {GOLDEN / 'qwen3_moe'}}}\n"
        "lora: {rank: 2, alpha: 4}\n"
        f"data: {{train: {data}, max_length: 16}}\n"
        "train: {max_steps: 2, batch_size: 4}\n"
    )
    assert main(["train", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "layers/mlp/experts/gate_up" in shown
    assert "experts" in shown
    model = ["--model", str(GOLDEN / "qwen3_moe")]
    assert main(["export", "--adapter", str(run), *model, "--out", str(out)]) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.experts.down_proj" in settings["target_parameters"]
