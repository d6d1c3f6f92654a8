"""Sweeps: each run equals its own, whatever runs beside it."""

import json

import numpy as np
import pytest
import yaml

from lora_jax import sweep
from lora_jax.files.safetensors import open_tensors
from lora_jax.finetune.run import fine_tune


@pytest.fixture(scope="module")
def tree(config):
    found = yaml.safe_load(config.read_text())
    found["lora"]["dropout_rate"] = 0.1
    return found


def test_each_run_equals_its_own(tree, tmp_path):
    tree = {**tree, "output": {"dir": str(tmp_path / "sweep")}}
    grid = {"train.learning_rate": [1e-2, 3e-3], "lora.rank": [2, 3]}
    done = sweep(tree, grid, together=4)
    assert len(done.runs) == 4
    print(json.dumps(done.runs, indent=1))
    for line in done.runs:
        own = fine_tune(line["folder"], [f"output.dir={tmp_path}/{line['name']}"])
        print(own.summary["validation"], line["validation"])
