"""A run on a mixture of experts, from settings to an adapter that PEFT reads."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli.main import main
from lora_jax.finetune.checks import check_experts
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.settings import load_settings
from lora_jax.models.source import open_source
from tests.models.golden import GOLDEN

ROOT = Path(__file__).parent.parent.parent
FIVE_DEVICES = "--xla_force_host_platform_device_count=5"


@pytest.mark.slow
def test_experts_are_trained_on_a_mesh_and_exported(tmp_path):
    data, config = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    lines = [{"input_ids": [3 + (i + j) % 40 for j in range(9)]} for i in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, out = tmp_path / "run", tmp_path / "peft"
    config.write_text(
        f"output: {{dir: {run}}}\n"
        f"model: {{path: {GOLDEN / 'qwen3_moe'}}}\n"
        "lora: {rank: 2, alpha: 4, targets: [q_proj, down_proj]}\n"
        f"data: {{train: {data}, max_length: 16}}\n"
        "train: {max_steps: 2, batch_size: 4, router_aux_loss_coef: 0.5}\n"
        "mesh: {expert: 5}\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FIVE_DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "lora_jax.cli.main", "train", str(config)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"layers/mlp/experts/down +2 +experts +5 x 7 x 20 ", done.stdout)
    assert "experts: not adapted: layers/mlp/experts/gate_up, 2,800" in done.stdout
    assert "data 1 x fsdp 1 x tensor 1 x expert 5" in done.stdout
    (trained,) = (
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "train"
    )
    assert 2 < trained["router_aux_loss"] < 5  # two experts of five: 2 if they are even
    assert trained["loss"] - 0.5 * trained["router_aux_loss"] < 2 * math.log(43)
    model = ["--model", str(GOLDEN / "qwen3_moe")]
    assert main(["export", "--adapter", str(run), *model, "--out", str(out)]) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.experts.down_proj" in settings["target_parameters"]


@pytest.mark.parametrize(
    ("name", "axis", "coefficient", "message"),
    [
        ("llama", 1, 0.0, None),
        ("qwen3_moe", 5, 0.1, None),
        (
            "llama",
            2,
            0.1,
            "The model has no experts: train.router_aux_loss_coef must be 0; got 0.1. "
            "mesh.expert must be 1; got 2.",
        ),
        (
            "qwen3_moe",
            4,
            0.0,
            "mesh.expert must divide the model's 5 experts; got 4. Use 5, or "
            "mesh.uneven=replicate for all experts on every device.",
        ),
    ],
)
def test_settings_of_experts_must_fit_the_model(name, axis, coefficient, message):
    tree = {
        "model": {"path": "any"},
        "data": {"train": "any"},
        "output": {"dir": "any"},
        "train": {"router_aux_loss_coef": coefficient},
    }
    config = open_source(GOLDEN / name).config
    faults = contextlib.nullcontext()
    if message is not None:
        faults = pytest.raises(UserError, match=f"^{re.escape(message)}$")
    with faults:
        check_experts(config, load_settings(tree), axis=axis)
    if axis == 4:
        check_experts(config, load_settings(tree, ["mesh.uneven=replicate"]), axis=axis)
