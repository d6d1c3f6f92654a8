"""LAWS 19: eight devices train as one does, and nothing moves that need not."""

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
    """What eight_devices.py saw, in one process with eight devices."""
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
def test_twenty_steps_have_the_losses_of_one_device(report, mesh):
    losses = report["losses"]
    assert len(losses) == 20
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(report["meshes"][mesh]["losses"], losses, rtol=1e-5)


@by_mesh
def test_the_adapters_at_the_end_are_those_of_one_device(report, mesh):
    # Adam divides by the gradient's size: a last bit of a small one counts for more.
    assert report["meshes"][mesh]["adapters"] < 5e-6


@by_mesh
def test_the_state_stays_where_it_was_and_compiles_once(report, mesh):
    seen = report["meshes"][mesh]
    assert seen["is_in_place"]
    assert seen["compiled_before"] > 0  # to look at the HLO; the steps use the same
    assert set(seen["compilations"]) == {0}


def test_adapters_lie_like_the_weights_they_adapt(report):
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


def test_the_optimizer_lies_like_the_adapters(report):
    seen = report["meshes"]["2x2x2"]
    specs = [spec for path, spec in seen["specs"].items() if path.startswith("lora")]
    # Adam has two moments of each.
    assert sorted(map(str, seen["moments"])) == sorted(map(str, specs * 2))


@pytest.mark.parametrize("mesh", ["8x1", "2x2x2"])
def test_no_device_computes_rows_of_others(report, mesh):
    assert report["meshes"][mesh]["activations_of_others"] == []


def shapes(report):
    """Shapes of one layer as FSDP gathers it, and those that nothing may gather.

    FSDP's gather leaves an axis cut that lies on ``tensor``. A gather that makes this
    axis whole, or that is of all layers of a scan, moves more than it need.
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
def test_a_layer_is_gathered_when_it_is_used_and_nothing_whole_is(report, model):
    may, must_not = shapes(report[model])
    assert len(may) == 3
    assert may & must_not == set()  # the sizes tell them apart
    assert gathered(report[model]) & must_not == set()
    assert may <= gathered(report[model])


def test_without_the_constraints_the_law_is_seen_broken(report):
    may, must_not = shapes(report["broken"])
    assert gathered(report["broken"]) & must_not != set()
    assert not may <= gathered(report["broken"])


def test_data_and_tensor_parallel_alone_gather_nothing(report):
    assert report["meshes"]["1x8"]["gathers"] == []
    assert report["meshes"]["8x1"]["gathers"] == []


@by_mesh
def test_merging_under_jit_moves_nothing(report, mesh):
    assert report["meshes"][mesh]["merge_moved"] == []
    assert report["meshes"][mesh]["merged"] < 2e-5


def test_a_checkpoint_restores_on_another_mesh(report):
    assert report["checkpoint"] == {"step": 20, "is_equal": True, "is_placed": True}
