"""`lora-jax plan` on this machine: what fits, and what to change where it doesn't."""

import json

import jax
import pytest

from lora_jax.cli import plan as command
from lora_jax.finetune import pricing
from lora_jax.finetune.devices import Devices
from lora_jax.plan.fit import device_memory
from lora_jax.train.state import TrainState


@pytest.mark.slow
def test_a_step_that_fits_says_in_how_much(config, call, monkeypatch):
    monkeypatch.setattr(pricing, "device_memory", lambda device: 3 * 10**6)
    code, out, shown = call("plan", config, "--json", "--largest-batch")
    plan = json.loads(out)
    assert code == 0, shown
    assert plan["limit"] == 3 * 10**6
    assert plan["step"]["lora"]["total"] < 3 * 10**6
    assert plan["largest_batch"] > 8
    assert plan["remat"] is None  # an encoder has no policies
    assert "fits this machine's" in shown


def test_a_step_that_does_not_fit_names_the_batch_that_does(config, call, monkeypatch):
    code, out, _ = call("plan", config, "--json")
    needed = json.loads(out)["step"]["lora"]["total"]
    monkeypatch.setattr(pricing, "device_memory", lambda device: needed - 1)
    code, _, shown = call("plan", config)
    assert code == 2
    shown = " ".join(shown.split())
    assert "a step of 8 x 16 tokens needs" in shown
    found = int(shown.partition("train.batch_size=")[2].partition(":")[0])
    assert 1 <= found < 8


def test_where_no_batch_fits_the_error_says_what_else_helps(config, call, monkeypatch):
    monkeypatch.setattr(pricing, "device_memory", lambda device: 999)
    code, _, shown = call("plan", config)
    assert code == 2
    shown = " ".join(shown.split())
    assert "this machine has 999 B" in shown
    assert "Even the smallest batch does not fit" in shown


@pytest.mark.parametrize("stats", [None, {"bytes_limit": 7}], ids=["cpu", "gpu"])
def test_the_memory_of_a_device_is_its_allocators_or_the_machines(stats):
    class Device:
        def memory_stats(self):
            return stats

    found = device_memory(Device())
    assert found == 7 if stats else found > 2**28


def test_steps_are_priced_from_shapes_alone_whatever_the_settings(
    config, call, monkeypatch
):
    create = TrainState.create

    def traced(variables, tx, rng):
        assert all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(variables))
        return create(variables, tx, rng)

    monkeypatch.setattr(TrainState, "create", traced)
    words = ["train.lora_b_ratio=16", "mesh.fsdp=2"]  # no B in a full step; one device
    words += ["lora.tokens=[4, superb]"]
    code, out, shown = call("plan", config, *words, "--json")
    assert code == 0, shown
    assert json.loads(out)["step"]["full"]["total"] > 0
    [rows] = json.loads(out)["token_rows"]
    assert rows == {"path": "encoder/embeddings/word", "tokens": [4, 5], "width": 16}
    assert "rows of 2 tokens" in shown
    assert "one of 1; the run used" in shown


def test_batches_divide_over_the_mesh_as_they_must_in_training(
    config, call, monkeypatch
):
    monkeypatch.setattr(Devices, "parts", 3)
    code, _, shown = call("plan", config)
    assert code == 2
    assert "got 8. Use 6 or 9" in shown
    units = []
    monkeypatch.setattr(
        command, "largest_batch", lambda price, unit: units.append(unit)
    )
    words = ["train.batch_size=12", "train.accumulate=2", "--largest-batch"]
    code, _, shown = call("plan", config, *words)
    assert code == 0, shown
    assert units == [6]


@pytest.mark.slow
def test_runs_side_by_side_are_priced(config, call, monkeypatch):
    monkeypatch.setattr(pricing, "device_memory", lambda device: 3 * 10**6)
    code, out, shown = call("plan", config, "--json", "--together", "3")
    assert code == 0, shown
    plan = json.loads(out)
    together, alone = plan["together"], plan["step"]["lora"]
    assert together["total"] > alone["total"]
    assert together["base"] == alone["base"]
    assert together["trained"] == 3 * alone["trained"]
    assert together["largest"] > 3
    assert f"at most {together['largest']} fit" in shown
