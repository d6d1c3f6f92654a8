"""Eight devices compute a mixture of experts like one, however they share it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_gradients_are_those_of_one_device_on_every_mesh():
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_experts"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert len(report) == 4
    assert max(error for error, *_ in report.values()) < 1e-5
    assert report["data"][1] == [2, 8, 16, 16]
    assert report["data, expert"][1] == [2, 2, 16, 16]
    assert report["fsdp, tensor, expert"][1] == [2, 4, 8, 8]
    # B of gate and up [2, 8, 2, 16] and A of down [2, 8, 8, 2], over fsdp and tensor
    assert report["fsdp, tensor, expert"][2] == [[2, 4, 2, 4], [2, 4, 2, 2]]
    assert report["data, fsdp, tensor"][2] == [[2, 8, 2, 4], [2, 8, 2, 2]]


def test_experts_must_divide_the_devices():
    with pytest.raises(ValueError, match=r"expert must divide the 1 devices.*got 2"):
        make_mesh(expert=2)
    assert "expert" not in make_mesh().shape
