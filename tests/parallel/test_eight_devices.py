"""LAWS 19: eight devices train like one, without needless communication."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.eight_devices import CONFIG

ROOT = Path(__file__).parent.parent.parent
MESHES = ("1x8", "8x1", "2x2x2")
pytestmark = pytest.mark.slow
by_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.fixture(scope="module")
def report():
    """The results of eight_devices.py, in one process with eight devices."""
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.parallel.eight_devices"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@by_mesh
def test_twenty_steps_match_the_losses_of_one_device(report, mesh):
    losses = report["losses"]
    assert len(losses) == 20
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(report["meshes"][mesh]["losses"], losses, rtol=1e-5)


@by_mesh
def test_the_final_adapters_match_one_device(report, mesh):
    # Adam divides by the gradient's size, which amplifies rounding of small ones.
    assert report["meshes"][mesh]["adapters"] < 5e-6


@by_mesh
def test_the_state_keeps_its_sharding_and_compiles_once(report, mesh):
    seen = report["meshes"][mesh]
    assert seen["is_in_place"]
    assert seen["compiled_before"] > 0  # to look at the HLO; the steps use the same
    assert set(seen["compilations"]) == {0}


def test_adapters_are_sharded_like_their_weights(report):
    specs = report["meshes"]["2x2x2"]["specs"]
    found = {
        path.replace("layers/", ""): spec
        for path, spec in specs.items()
        if "/up/" in path or "/down/" in path or "norm" in path
    }
    assert found == {
        "frozen/mlp/up/kernel": [None, "fsdp", "tensor"],
        "frozen/mlp/down/kernel": [None, "tensor", "fsdp"],
        "frozen/attention_norm/scale": [None, None],
        "frozen/mlp_norm/scale": [None, None],
        "frozen/final_norm/scale": [None],
        "lora/mlp/up/lora_a": [None, "fsdp", None],
        "lora/mlp/up/lora_b": [None, None, "tensor"],
        "lora/mlp/down/lora_a": [None, "tensor", None],
        "lora/mlp/down/lora_b": [None, None, "fsdp"],
    }


def test_the_optimizer_state_is_sharded_like_the_adapters(report):
    seen = report["meshes"]["2x2x2"]
    specs = [spec for path, spec in seen["specs"].items() if path.startswith("lora")]
    # Adam has two moments of each.
    assert sorted(map(str, seen["moments"])) == sorted(map(str, specs * 2))


@pytest.mark.parametrize("mesh", ["8x1", "2x2x2"])
def test_no_device_computes_rows_of_another(report, mesh):
    assert report["meshes"][mesh]["activations_of_others"] == []


def shapes(report):
    """Returns the shapes that FSDP may gather for one layer, and forbidden shapes.

    FSDP's all-gather leaves an axis sharded over ``tensor``. Gathering that axis too,
    or all layers of a scan, is needless communication.
    """
    may, must_not = set(), set()
    for path, (shape, spec) in report["weights"].items():
        if "fsdp" not in spec:
            continue  # a norm
        is_stack = path.startswith("layers/")
        shape, spec = shape[is_stack:], spec[is_stack:]
        (i,) = (n for n, axis in zip(shape, spec, strict=True) if axis == "fsdp")
        (o,) = (n for n, axis in zip(shape, spec, strict=True) if axis == "tensor")
        may.add(tuple(sorted((i, o // 2))))
        must_not |= {tuple(sorted(s)) for s in ((i, o), (i // 2, o))}
        if is_stack:
            layers = CONFIG.num_layers
            parts = itertools.product((i, i // 2), (o, o // 2))
            must_not |= {tuple(sorted((layers, *s))) for s in parts}
    return may, must_not


def gathered(report):
    return {tuple(sorted(shape)) for shape in report["gathers"]}


@pytest.mark.parametrize("model", ["scanned", "tied"])
def test_layers_are_gathered_one_at_a_time(report, model):
    may, must_not = shapes(report[model])
    assert len(may) == 3
    assert may & must_not == set()  # distinct sizes
    assert gathered(report[model]) & must_not == set()
    assert may <= gathered(report[model])


def test_without_the_constraints_the_check_fails(report):
    may, must_not = shapes(report["broken"])
    assert gathered(report["broken"]) & must_not != set()
    assert not may <= gathered(report["broken"])


def test_data_and_tensor_parallel_alone_gather_nothing(report):
    assert report["meshes"]["1x8"]["gathers"] == []
    assert report["meshes"]["8x1"]["gathers"] == []


@by_mesh
def test_merging_under_jit_needs_no_communication(report, mesh):
    assert report["meshes"][mesh]["merge_moved"] == []
    assert report["meshes"][mesh]["merged"] < 2e-5


def test_a_checkpoint_restores_on_another_mesh(report):
    assert report["checkpoint"] == {"step": 20, "is_equal": True, "is_placed": True}
