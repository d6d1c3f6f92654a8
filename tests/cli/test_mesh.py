"""`lora-jax train` on a mesh of eight forced host devices, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_jax.files.adapter import load_adapter
from lora_jax.finetune.devices import Devices, check_batch
from lora_jax.finetune.settings import load_settings
from lora_jax.tree.paths import flatten

ROOT = Path(__file__).parent.parent.parent
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def eight_devices(*words, step=-1):
    """Runs commands in one process with eight devices; a SIGINT comes at a step."""
    command = [sys.executable, "-m", "tests.cli.at_step", str(step), "SIGINT"]
    return subprocess.run(
        [*command, *map(str, words)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_run_on_one_mesh_goes_on_on_another_and_is_evaluated_on_one_device(
    config, run_dir, tmp_path, call
):
    words = ["train", config, f"output.dir={tmp_path}/run", "mesh.uneven=replicate"]
    done = eight_devices(
        *(*words, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "--and"),
        *(*words, "mesh.data=4", "mesh.tensor=2", "--resume"),
        step=14,
    )
    assert done.returncode == 0, done.stderr
    assert "data 2 x fsdp 2 x tensor 2" in done.stdout
    assert "The checkpoint of step 15 is saved." in done.stderr
    assert "Resuming at step 15 of 24" in done.stdout
    assert "data 4 x fsdp 1 x tensor 2" in done.stdout
    one, many = (
        json.loads((folder / "summary.json").read_text())
        for folder in (run_dir, tmp_path / "run")
    )
    assert many["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    for split in ("validation", "test"):
        assert many[split] == pytest.approx(one[split], rel=1e-4)
    assert many["baseline"]["test_accuracy"] == one["baseline"]["test_accuracy"]
    mine, theirs = (
        flatten(load_adapter(folder / "adapter").variables)
        for folder in (tmp_path / "run", run_dir)
    )
    for path, leaf in mine.items():
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-4, err_msg=path)
    code, out, shown = call("eval", "--run", tmp_path / "run", "--json")
    assert code == 0, shown
    assert json.loads(out)["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)
    assert "one of 1; the run used" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mesh.fsdp=3"],
            "3 x 1 = 3 does not. The nearest that works: data = 1, fsdp = 1",
        ),
        (["mesh.fsdp=-1"], "or one of them -1"),
        (["mesh.tensor=0"], "must be at least 1"),
        (["mesh.tensro=2"], "mesh.tensro: unknown key. Did you mean 'tensor'?"),
        (["mesh.uneven=pad"], "must be 'error' or 'replicate'; got 'pad'"),
        (["mesh.rules={up/kernel: [model]}"], "mesh.rules"),
        (["mesh.rules={(up: [fsdp]}"], "'(up' is not a regular expression"),
    ],
)
def test_meshes_that_can_not_be_are_refused(words, message, config, tmp_path, call):
    code, _, shown = call("train", config, *words, f"output.dir={tmp_path}/run")
    assert code == 2
    assert message in shown
    assert not (tmp_path / "run").exists()


class TwoByTwo(Devices):
    """The sizes of a mesh of 2 x 2 x 2 devices: the suite has one."""

    sizes = {"data": 2, "fsdp": 2, "tensor": 2}  # noqa: RUF012 - never changed


def test_a_batch_that_does_not_divide_names_the_numbers_and_those_that_do(config):
    overrides = ["train.batch_size=10", "train.accumulate=2"]
    settings = load_settings(config, overrides)
    with pytest.raises(ValueError, match="must be a multiple of data x fsdp") as error:
        check_batch(settings, TwoByTwo())
    assert "= 2 x 2 x 2 = 8 on a mesh of data 2 x fsdp 2 x tensor 2" in str(error.value)
    assert "got 10. Use 8 or 16, or another mesh." in str(error.value)
    check_batch(load_settings(config, ["train.batch_size=16"]), TwoByTwo())
    assert [TwoByTwo().rows(n) for n in (1, 4, 5)] == [4, 4, 8]
