"""Eight devices that split rows of tokens compute what one device does."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.models.decoder_config import check_split
from lora_jax.models.mixer_config import DeltaNetConfig
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.sequence import check_length
from tests.parallel.eight_devices import CONFIG

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def report():
    """The results of eight_sequence.py, in a process with eight devices."""
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_sequence"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_one_device(report):
    # With packed rows, grouped heads, a window, a soft-cap, sinks and experts.
    assert report["logits"] < 1e-5
    assert report["loss and gradients"] < 1e-5


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_tokens(report):
    assert report["shard"] == [2, 10]
    assert report["whole"] == []


def test_models_whose_layers_carry_a_state_are_refused():
    state = DeltaNetConfig(2, 1, 4, 4, 2)
    hybrid = dataclasses.replace(
        CONFIG, layer_changes=((), (("mixer", state),)), is_causal=False
    )
    with pytest.raises(ValueError, match="sequence must be 1") as error:
        check_split(hybrid)
    assert "its attention sees later tokens" in str(error.value)
    assert "layers 1 (DeltaNet) carry a state" in str(error.value)
    check_split(CONFIG)


def test_rows_that_do_not_divide_name_the_lengths_that_do():
    message = r"2 x sequence = 2 x 4 = 8 on this mesh; got 20. Take 16 or 24\."
    with pytest.raises(ValueError, match=message):
        check_length(20, {"data": 2, "sequence": 4})
    with pytest.raises(ValueError, match=r"got 7\. Take 8\."):
        check_length(7, {"sequence": 4})
    check_length(20, {"data": 8})


def test_the_axis_must_divide_the_devices():
    with pytest.raises(ValueError, match=r"sequence must divide the 1 devices; got 2"):
        make_mesh(sequence=2)
    assert "sequence" not in make_mesh().shape
