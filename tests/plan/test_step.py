"""Plans of steps on this machine's one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lora_jax.attention.gated_delta import gated_delta_rule
from lora_jax.config import LoRAConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.mixer_config import DeltaNetConfig
from lora_jax.names import FROZEN, PARAMS
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.rules import make_sharding
from lora_jax.plan.flops import step_flops, traced_flops
from lora_jax.plan.step import device_bytes, parse_too_large, price_step
from lora_jax.plan.topology import DecoderSteps
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step
from tests.plan.test_slices import TINY

LORA = LoRAConfig(rank=4, alpha=8)
BIG = 2**40


@pytest.fixture(scope="module")
def steps():
    mesh = make_mesh(devices=jax.devices()[:1])
    decoder = Decoder(TINY, scan_layers=True, remat="block")
    sharding = make_sharding(mesh)
    return DecoderSteps(decoder, LORA, 32, sharding, BIG, param_dtype=jnp.float32)


@pytest.fixture(scope="module")
def plan(steps):
    return steps.price(2)


def test_the_plan_matches_the_bytes_of_a_real_state(plan):
    decoder = Decoder(TINY, scan_layers=True, remat="block")
    ids = jnp.zeros((2, 32), jnp.int32)
    adapted = adapt(decoder, LORA)
    params = jax.jit(decoder.init)(jax.random.key(0), ids)[PARAMS]
    variables = adapted.attach(params, jax.random.key(1))
    tx = lora_optimizer(1e-4, total_steps=1000)
    state = TrainState.create(variables, tx, jax.random.key(2))

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert plan.base == size(state.frozen[FROZEN])
    assert plan.trained == size(state.trainable)
    assert plan.optimizer == size(state.opt_state)
    batch = {"input_ids": ids, "labels": ids, "weights": jnp.ones((2, 32))}
    step = make_train_step(make_lm_loss(adapted, is_tied=False), tx)
    memory = step.lower(state, batch).compile().memory_analysis()
    assert plan.temporaries == memory.temp_size_in_bytes
    assert plan.fits
    assert plan.total < BIG
    same = price_step(step, state, batch)
    assert same.parts == plan.parts
    assert same.flops == plan.flops > 0
    assert same.fits


def test_a_step_without_the_memory_does_not_fit(steps, plan):
    assert not replace(steps, limit=plan.total - 1).price(2).fits
    alone = replace(steps, limit=plan.base).price(2)
    assert not alone.fits
    assert alone.temporaries is None
    assert alone.compile_seconds == alone.flops == 0


def test_a_policy_defaults_to_the_decoders(steps, plan):
    other = steps.price(2, "none")
    assert (plan.remat, other.remat) == ("block", "none")
    assert steps.flops(other).lora < steps.flops(plan).lora
    assert other.flops < plan.flops


class _Refused:
    """A step that the TPU compiler rejects."""

    jaxpr = jax.make_jaxpr(jnp.sin)(1.0)

    def __init__(self, message):
        self.message = message

    def trace(self, state, batch):
        return self

    def lower(self):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_compiler_failures_are_out_of_memory_or_errors(plan):
    zero = jnp.zeros(3)
    state = TrainState(zero, {}, {"frozen": zero}, (), zero, zero)
    batch = {"input_ids": zero.reshape(1, 3)}
    step = _Refused("Ran out of memory: Used 20.50G of 15.75G hbm.")
    found = price_step(step, state, batch, limit=16 * 2**30)
    assert not found.fits
    assert found.temporaries == 20.5 * 2**30
    assert found.base == 12
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out"):
        price_step(step, state, batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
        price_step(_Refused("another reason"), state, batch, limit=BIG)


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def traced(request):
    return trace_step(TINY, scan_layers=request.param)


def trace_step(config, *, scan_layers):
    """A step of a tiny decoder, and its FLOPs by formula."""
    decoder = Decoder(config, scan_layers=scan_layers)
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    adapted = adapt(decoder, LORA, ids)
    params = jax.eval_shape(decoder.init, jax.random.key(0), ids)[PARAMS]
    variables = jax.eval_shape(adapted.attach, params, jax.random.key(0))
    tx = lora_optimizer(1e-4, total_steps=9)
    state = jax.eval_shape(
        lambda v, k: TrainState.create(v, tx, k), variables, jax.random.key(0)
    )
    batch = {"input_ids": ids, "labels": ids, "weights": ids}
    step = make_train_step(make_lm_loss(adapted, is_tied=False), tx)
    formula = step_flops(config, params, adapted.targets(params), 2, 32, "none")
    return step.trace(state, batch), formula


def test_the_formula_matches_the_trace(traced):
    step, formula = traced
    assert formula.lora == pytest.approx(traced_flops(step.jaxpr.jaxpr), rel=0.1)
    assert 0.2 < formula.saved < 1 / 3


def test_the_state_of_a_delta_net_is_counted_as_it_is_computed():
    sizes = DeltaNetConfig(
        num_heads=4, num_key_heads=2, key_dim=3, value_dim=5, conv_size=4
    )
    shapes = ((2, 3), (2, 3), (4, 5), (4,), (4,))  # of a token
    arrays = [jax.ShapeDtypeStruct((2, 128, *own), jnp.float32) for own in shapes]
    counted = traced_flops(jax.make_jaxpr(gated_delta_rule)(*arrays).jaxpr)
    assert counted == pytest.approx(2 * 128 * sizes.token_flops(128))


def test_of_a_mixture_only_the_experts_that_a_token_meets_are_counted():
    few, all_six = (
        trace_step(replace(TINY, experts=ExpertConfig(6, chosen, 96)), scan_layers=True)
        for chosen in (2, 6)
    )
    for step, formula in (few, all_six):
        counted = traced_flops(step.jaxpr.jaxpr)
        assert formula.lora == pytest.approx(counted, rel=0.1)
    kernels = 2 * 256 * 3 * 96  # of an expert, in both layers
    update = 2 * 4 * (256 + 2 * 96 + 96 + 256)
    more = 2 * 32 * (6 - 2) * (4 * kernels + 6 * update)
    assert all_six[1].lora - few[1].lora == pytest.approx(more)


@pytest.mark.parametrize("traced", [False], indirect=True)
def test_traced_flops_of_an_unrolled_step_match_xla(traced):
    step, _ = traced
    counted = step.lower().compile().cost_analysis()["flops"]
    assert traced_flops(step.jaxpr.jaxpr) == pytest.approx(counted, rel=0.1)


def test_loops_branches_and_convolutions_are_counted():
    x, kernel = jnp.ones((2, 8, 3)), jnp.ones((5, 3, 4))

    def program(x, kernel):
        conv = jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        square = jax.lax.map(lambda y: y.T @ y, conv)  # twice [4, 8] [8, 4]
        return jax.lax.cond(x[0, 0, 0] > 0, lambda s: s @ s, jnp.sin, square)

    found = traced_flops(jax.jit(program).trace(x, kernel).jaxpr.jaxpr)
    assert found == 2 * (2 * 8 * 4 * 5 * 3 + 2 * 4 * 4 * 8 + 2 * 4 * 4 * 4)


def test_an_indivisible_batch_and_other_failures_are_errors(steps):
    with pytest.raises(ValueError, match="must be divisible by data x fsdp"):
        steps.price(0)
    assert parse_too_large("something else") is None
    message = (
        "the total memory required for HLO temporaries (27.01G) exceeds available HBM "
        "(15.75G)."
    )
    assert parse_too_large(message) == round(27.01 * 2**30)


def test_shapes_with_shardings_are_counted_per_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    leaf = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=whole)
    assert device_bytes({"a": leaf}) == 24
