"""The NNX rows of the benchmark against the Linen ones: one computation, one cost."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import contenders, rivals, specs
from benchmarks.harness import Contender
from lora_jax.models.decoder_config import Rope
from lora_jax.plan.flops import traced_flops

TINY = dataclasses.replace(
    specs.SMALL,
    **{"vocab_size": 64, "hidden_size": 32, "mlp_size": 64, "head_dim": 16},
    **{"num_heads": 2, "num_kv_heads": 2, "num_layers": 2},
    ropes=(Rope(10000.0, 16),),
    layer_ropes=(0,) * 2,
    layer_windows=(None,) * 2,
)


@pytest.fixture
def steps(monkeypatch):
    """Collects the steps of contenders, compiled and not run."""
    found = []

    def collect(step, *args, trained):
        found.append((step.trace(*args), trained))
        return Contender(None, 0.0, None, None, {})

    for module in (rivals, contenders):
        monkeypatch.setattr(module, "stepper", collect)
    return found


def test_a_step_on_nnx_computes_and_keeps_what_it_does_on_linen(steps):
    ids = np.arange(2 * 65).reshape(2, 65) % 64
    batch = contenders.lm_batch(ids)
    contenders.ours(TINY, "lora", batch)
    contenders.ours_on_nnx(TINY, batch)
    flops, trained, temporaries = zip(*map(costs, steps), strict=True)
    assert flops[1] == flops[0] > 0
    assert trained[1] == trained[0]
    assert temporaries[1] <= temporaries[0]


def test_flax_and_we_train_the_same_layer(steps):
    task, _, _ = contenders.layer_task(specs.DenseSpec("tiny", 16, 8, 4))
    contenders.our_nnx_layer(16, task)
    rivals.nnx_layer(16, task)
    assert [trained for _, trained in steps] == [2 * 16 * 8] * 2


def costs(step: tuple[jax.stages.Traced, int]) -> tuple[float, int, int]:
    traced, trained = step
    memory = traced.lower().compile().memory_analysis()
    flops = traced_flops(traced.jaxpr.jaxpr)
    return flops, trained, memory.temp_size_in_bytes
