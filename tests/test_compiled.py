"""The benchmark that compiles for chips that are not here."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compiled, contenders, rivals, specs, targets
from benchmarks.gpu_schedule import BANDWIDTH, PEAK_FLOPS, sum_kernels
from benchmarks.schedule import Cycles, sum_cycles
from lora_jax import LoRAConfig, adapt
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.experts import Mixture
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh
from lora_jax.plan.flops import traced_flops

TPU = """\
HloModule jit_step, is_scheduled=true

%body (x: s32[]) -> s32[] {
  %a = f32[] fusion(), backend_config={"estimated_cycles":"7"}
  %g = f32[] fusion(), kind=kCustom, calls=%fused, metadata={op_name="f/ragged_dot_general"}, backend_config={"estimated_cycles":"800"}
  ROOT %k = f32[] custom-call(), custom_call_target="tpu_custom_call"
}

%condition (x: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %c = pred[] compare(), backend_config={"estimated_cycles":"1000"}
}

%small (x: f32[]) -> f32[] {
  ROOT %s = f32[] fusion(), backend_config={"estimated_cycles":"1"}
}

%large (x: f32[]) -> f32[] {
  ROOT %l = f32[] fusion(), backend_config={"estimated_cycles":"100"}
}

%fused (x: f32[]) -> f32[] {
  ROOT %f = f32[] add(), backend_config={"estimated_cycles":"9999"}
}

ENTRY %main (x: f32[]) -> f32[] {
  %w = s32[] while(%x), condition=%condition, body=%body
  %b = f32[] conditional(%x), branch_computations={%small, %large}
  ROOT %f = f32[] fusion(%b), calls=%fused, backend_config={"estimated_cycles":"20"}
}
"""  # noqa: E501 - lines as the compiler prints them
GPU = """\
HloModule jit_step, is_scheduled=true

%nested (p: bf16[2000,3000], q: bf16[3000,5000]) -> bf16[2000,5000] {
  %p = bf16[2000,3000]{1,0} parameter(0)
  %q = bf16[3000,5000]{1,0} parameter(1)
  ROOT %dot = bf16[2000,5000]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%gemm (p.1: bf16[2000,3000], q.1: bf16[3000,5000]) -> bf16[2000,5000] {
  ROOT %f = bf16[2000,5000]{1,0} fusion(%p.1, %q.1), kind=kCustom, calls=%nested
}

%command_buffer (x: f32[]) -> f32[] {
  %w = bf16[3000,5000]{1,0} parameter(1)
  %a = bf16[2000,3000]{1,0} fusion(%w), kind=kLoop, calls=%fused, backend_config={"reification_cost":[{"exec_time_us":5.5,"name":""},{"exec_time_us":7,"name":"sol"}]}
  ROOT %b = bf16[2000,5000]{1,0} fusion(%a, %w), kind=kCustom, calls=%gemm, backend_config={"reification_cost":[{"exec_time_us":999,"name":""}]}
}

ENTRY %main (x: f32[]) -> f32[] {
  %l = s32[] while(%x), condition=%c, body=%command_buffer, backend_config={"known_trip_count":{"n":"3"}}
  %t = bf16[5000,8]{1,0} get-tuple-element(%l), index=0
  %thin = bf16[2000,8]{1,0} dot(%b, %t), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %n = f32[8]{0} fusion(%t), kind=kCustom, calls=%norm, backend_config={"reification_cost":[{"exec_time_us":999,"name":""},{"exec_time_us":2,"name":"indexing-cost-model"}]}
  ROOT %r = f32[] copy(%t)
}
"""  # noqa: E501 - lines as the compiler prints them


def test_cycles_count_a_loop_as_often_as_it_runs_and_the_slowest_branch():
    assert sum_cycles(TPU) == Cycles(total=5 * 7 + 100 + 20, unknown=5 * 2)
    limit = Cycles(total=5 * (7 + 800) + 100 + 20, unknown=5)
    assert sum_cycles(TPU, by_groups=True) == limit


def test_a_program_without_estimates_is_refused():
    with pytest.raises(ValueError, match=r"carry `estimated_cycles`.*found none"):
        sum_cycles(GPU)


def test_a_gpus_matmuls_take_their_least_time_and_other_kernels_the_models():
    found = sum_kernels(GPU)
    assert (found.launches, found.unknown) == (3 * 2 + 3, 1)
    wide = 1e6 * 2 * 2000 * 3000 * 5000 / PEAK_FLOPS  # more than its traffic
    thin = 1e6 * 2 * (2000 * 5000 + 5000 * 8 + 2000 * 8) / BANDWIDTH
    assert found.microseconds == pytest.approx(3 * (5.5 + wide) + thin + 2, abs=0.05)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def test_a_contender_is_compiled_from_shapes(mesh):
    with on_mesh_of(mesh):
        task, _, _ = contenders.layer_task(specs.DenseSpec("tiny", 16, 8, 4))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.params)
    task = task._replace(params=shapes)
    make = compiled._own()[compiled.OURS]
    found = targets.price(make, task, mesh)
    assert found["flops"] == 4 * (2 * 16 * 16 + 10 * 16 * 8)
    assert found["argument_bytes"] > 4 * (16 * 16 + 3 * 2 * 16 * 8)
    assert found.keys() == {
        *("flops", "temp_bytes", "argument_bytes", "output_bytes", "compile_seconds")
    }


@pytest.mark.parametrize("name", [compiled.OURS, compiled.PLAIN])
def test_a_contenders_inputs_are_arguments(mesh, name):
    task, _, _ = contenders.layer_task(specs.DenseSpec("tiny", 16, 8, 4))
    traced = targets.trace(compiled._own()[name], task, mesh)
    assert (4, 16) in [each.aval.shape for each in traced.jaxpr.jaxpr.invars]


EXPERTS = ExpertConfig(num_experts=5, num_chosen=2, size=9)


def test_plain_autodiff_of_experts_computes_what_ours_does(monkeypatch):
    model, x = Mixture(EXPERTS, "silu"), jax.random.normal(jax.random.key(0), (2, 3, 8))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    monkeypatch.setattr(rivals, "_by_autodiff", lambda *found: found)
    task: Any = rivals.Task(model, params, (x,), jnp.sum)
    found: Any = rivals.plain(task)
    forward, lora, frozen, _ = found
    draw = functools.partial(jax.random.normal, jax.random.key(2))
    lora = jax.tree.map(lambda leaf: 0.1 * draw(leaf.shape), lora)
    adapted = adapt(model, LoRAConfig(rivals.RANK, rivals.ALPHA), x)

    def plain(lora, frozen):
        return forward(lora, frozen, x)

    def ours(lora, frozen):
        return adapted.apply({"frozen": frozen, "lora": lora}, x)

    def flops(step):
        gradient = jax.grad(lambda lora: step(lora, frozen).sum())
        return traced_flops(jax.make_jaxpr(gradient)(lora).jaxpr)

    @jax.jit
    def outputs(lora, frozen):
        base = model.apply({"params": frozen}, x)
        return ours(lora, frozen), plain(lora, frozen), base

    wanted, got, base = map(np.asarray, outputs(lora, frozen))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert abs(wanted - base).max() > 0.1
    assert flops(ours) == flops(plain)


def test_a_token_is_counted_with_the_experts_it_is_sent_to(mesh):
    whole: Any = specs.qwen_moe(num_layers=1, vocab_size=11)
    assert (whole.experts.num_experts, whole.experts.num_chosen) == (128, 8)
    config = dataclasses.replace(
        whole,
        **{"hidden_size": 12, "num_heads": 3, "num_kv_heads": 1, "head_dim": 8},
        ropes=(dataclasses.replace(whole.ropes[0], rotary_dim=8),),
        experts=EXPERTS,
    )
    with on_mesh_of(mesh):
        spec = specs.DecoderSpec("tiny", config, 2, 5)
        _, task, formula, makers = compiled._decoder(spec)
    attention, head = 12 * (24 + 2 * 8 + 24), 12 * 11
    experts, router = 2 * 12 * 3 * 9, 12 * 5
    adapters = 8 * (36 + 20 + 20 + 36 + 2 * (30 + 21))
    kernels = attention + head + experts + router
    assert formula == 10 * (4 * kernels + 6 * adapters)
    assert not {compiled.QWIX, compiled.NNX} & makers.keys()
    floor = targets.trace(makers[compiled.FLOOR], task, mesh)
    assert traced_flops(floor.jaxpr.jaxpr) == 10 * 4 * (kernels - router)


def test_a_step_that_does_not_fit_says_what_it_needs(mesh, monkeypatch):
    class Program:
        jaxpr = jax.make_jaxpr(lambda x: x)(1.0)

        def lower(self):
            return self

        def compile(self, _):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm."
            )

    monkeypatch.setattr(targets, "trace", lambda *_: Program())
    nothing: Any = None
    found = targets.price(nothing, nothing, mesh)
    assert found == {"refused_bytes": 20.5 * 2**30}
    rows = [row(**{compiled.OURS: found, "other": {"cycles": 2_000_000, **KNOWN}})]
    assert "| lora_jax | – | – | does not fit: needs 20.5 GiB | – | – |" in (
        compiled.table(rows)
    )


KNOWN = {"temp_bytes": 2_000_000, "flops": 30.0, "unknown": 0}


def row(**found):
    shape = {"shape": "a layer", "target": "v5e:2x2", "formula": 20.0}
    return {**shape, **found, "missing": ["qwix LoraProvider (qwix is not installed)"]}


def test_the_table_compares_what_is_known():
    ours = {"cycles": 1_000_000, **KNOWN, "unknown": 2}
    rows = [row(**{compiled.OURS: ours, "other": {"cycles": 4_000_000, **KNOWN}})]
    text = compiled.table(rows)
    assert "| lora_jax | 1.000 + 2 kernels | 1.00 | 2.0 MB | 1.00 | 1.500 |" in text
    assert "| other | 4.000 | 0.25 | 2.0 MB | 1.00 | 1.500 |" in text
    assert "Not compiled: qwix LoraProvider (qwix is not installed)." in text


def test_a_result_is_found_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "DONE", tmp_path / "compiled.jsonl")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 1")
    calls = []

    def find():
        calls.append(1)
        return {"cycles": 3}

    for target in ("v5e:2x2", "v5e:2x2", "h100"):
        assert compiled.once("a layer", target, "ours", find)["cycles"] == 3
    assert len(calls) == 2
    assert compiled.once("a layer", "h100", "ours", None)["cycles"] == 3
    with pytest.raises(KeyError, match="ours has not been compiled for v5p"):
        compiled.once("a layer", "v5p:2x2x1", "ours", None)
    lines = (tmp_path / "compiled.jsonl").read_text().splitlines()
    assert [json.loads(line)["versions"] for line in lines] == [
        {"jax": "jax 1", "libtpu": "libtpu 1"},
        {"jax": "jax 1", "jax-cuda12-pjrt": "jax-cuda12-pjrt 1"},
    ]


def test_a_target_that_does_not_exist_names_the_nearest():
    with pytest.raises(ValueError, match=r"v5e has no slice '3x3'.*v5e:2x4"):
        compiled.main(quick=False, targets=["v5e:3x3"])


def test_a_missing_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"lora_jax\[tpu-plan\]"):
        compiled.main(quick=False)
    with pytest.raises(ModuleNotFoundError, match="--no-deps jax-cuda12-plugin"):
        compiled.main(quick=False, targets=["h100"])


def test_of_the_default_targets_those_without_a_compiler_are_left_out(
    monkeypatch, capsys
):
    def open_target(name):
        if name == "h100":
            return jax.devices()[0]
        raise ModuleNotFoundError("libtpu is missing")

    monkeypatch.setattr(compiled, "open_target", open_target)
    monkeypatch.setattr(compiled, "_row", lambda name, *_: {"target": name})
    rows = compiled.main(quick=False)
    assert {found["target"] for found in rows} == {"h100"}
    assert capsys.readouterr().out == "left out: libtpu is missing\n" * 3
