"""A training step as the TPU's compiler sees it, without a TPU: an estimate.

The contenders of `benchmarks.contenders` are compiled for one chip by libtpu, in
bfloat16, from shapes: nothing is allocated or run. FLOPs, bytes and memory are those of
the executable; the cycles are the compiler's own estimates, summed by
`benchmarks.schedule`, which says what they leave out.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import contenders, rivals, specs
from benchmarks.contenders import FLOOR, OURS
from benchmarks.harness import Contender
from benchmarks.schedule import sum_cycles
from benchmarks.rivals import ALPHA, RANK, Task
from lora_jax import LoRAConfig, adapt
from lora_jax.models.decoder import Decoder
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh
from lora_jax.plan.flops import traced_flops
from lora_jax.plan.step import parse_too_large
from lora_jax.plan.slices import check_topology, open_slice, uncached

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")  # one chip of each
DECODER = specs.DecoderSpec(
    "Llama-3.1-8B's shape, 4 of 32 layers, vocabulary 32,000",
    dataclasses.replace(specs.ACCELERATOR_DECODERS[0].config, vocab_size=32_000),
    2,
    2048,
)
Make = Callable[[Task], Contender]
Model = tuple[str, Task, float | None, dict[str, Make]]  # name, task, FLOPs, contenders


def main(
    quick: bool, topologies: Sequence[str] = TOPOLOGIES
) -> list[dict[str, Any]]:
    """Compiles all contenders for one chip of each topology.

    Args:
      quick: only the single layers, for the first topology.
      topologies: TPU slices, as `lora-jax plan --topology` takes them.

    Returns:
      One row per chip and model.
    """
    for name in topologies:  # before the first takes minutes
        check_topology(name)
    rows = []
    for name in topologies[:1] if quick else topologies:
        mesh = make_mesh(devices=open_slice(name)[:1])
        models = [functools.partial(_layer, spec) for spec in specs.DENSE[1:]]
        if not quick:
            encoders = [functools.partial(_encoder, spec) for spec in specs.ENCODERS]
            models = [functools.partial(_decoder, DECODER), *encoders, *models]
        for model in models:
            with on_mesh_of(mesh):  # what it is built for
                shape, task, formula, makers = model()
            found = {each: _priced(make, task, mesh) for each, make in makers.items()}
            rows.append(
                {
                    "shape": shape,
                    "topology": name,
                    "formula": formula,
                    **{k: v for k, v in found.items() if isinstance(v, dict)},
                    "missing": [f"{k} ({v})" for k, v in found.items() if isinstance(v, str)],
                }
            )
    return rows


def _priced(make: Make, task: Task, mesh: Mesh) -> dict[str, Any] | str:
    """Returns what the compiler says of a contender, or why there is nothing."""
    try:
        return price(make, task, mesh)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def price(make: Make, task: Task, mesh: Mesh) -> dict[str, Any]:
    """Compiles a contender's step for the first device of a mesh.

    Args:
      make: makes the contender, as on a device that is here.
      task: its model, whose parameters may be shapes, and its batch.
      mesh: of the device to compile for.

    Returns:
      ``flops``, ``bytes`` accessed, ``temp_bytes``, ``argument_bytes``,
      ``output_bytes``, ``cycles`` and ``kernels`` outside them (None where the compiler
      can't print the program) and ``compile_seconds``; of a step that is too large only
      ``refused_bytes``, the memory it needs.
    """
    traced = trace(make, task, mesh)
    lowered = traced.lower()
    start = time.perf_counter()
    try:
        with uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if needed := parse_too_large(str(error)):
            return {"refused_bytes": needed}
        raise
    seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    try:
        cycles = sum_cycles(compiled.as_text())._asdict()
    except jax.errors.JaxRuntimeError:
        cycles = {"total": None, "kernels": None}
    return {
        "flops": traced_flops(traced.jaxpr.jaxpr),
        "bytes": cost["bytes accessed"],
        "cycles": cycles["total"],
        "kernels": cycles["kernels"],
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def trace(make: Make, task: Task, mesh: Mesh) -> jax.stages.Traced:
    """Traces the step that a contender would run; see `price`."""
    place = NamedSharding(mesh, PartitionSpec())
    found = []

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=place)

    def capture(step: Any, *args: Any, **facts: Any) -> Contender:
        found.append((step, jax.tree.map(shape, args)))
        return Contender(None, 0.0, None, None, facts)

    def build(params: Any) -> None:
        make(task._replace(params=params))

    with (
        on_mesh_of(mesh),
        mock.patch.object(rivals, "stepper", capture),
        mock.patch.object(rivals, "repeater", capture),
        mock.patch.object(contenders, "stepper", capture),
    ):
        jax.eval_shape(build, task.params)
        ((step, args),) = found
        return step.trace(*args)


def _decoder(spec: specs.DecoderSpec) -> Model:
    """Next-token prediction; its adapters' and kernels' FLOPs without the scores."""
    config = spec.config
    ids = np.random.default_rng(0).integers(
        0, config.vocab_size, (spec.batch, spec.length + 1)
    )
    batch = contenders.lm_batch(ids)
    inputs = (batch["input_ids"],)
    model = Decoder(config, dtype=rivals.dtype())
    scanned = model.clone(scan_layers=True)
    params, stack = (_params(each, *inputs) for each in (model, scanned))
    loss = contenders.mean_loss(batch["labels"])
    task = Task(model, {"apart": params, "stack": stack}, inputs, loss)

    def apart(task: Task, remat: str = "none") -> Task:
        params = task.params["apart"]
        return task._replace(model=model.clone(remat=remat), params=params)

    def ours(module: Decoder, layout: str, remat: str) -> Make:
        module = module.clone(remat=remat)
        return lambda task: contenders.lm_step(module, task.params[layout], batch)

    labels = batch["labels"]
    makers: dict[str, Make] = {
        OURS: ours(scanned, "stack", "lora"),
        f"{OURS}, scanned, remat none": ours(scanned, "stack", "none"),
        f"{OURS}, scanned, remat block": ours(scanned, "stack", "block"),
        f"{OURS}, unrolled, remat none": ours(model, "apart", "none"),
        f"{OURS}, unrolled, remat lora": ours(model, "apart", "lora"),
        "plain autodiff": lambda task: rivals.plain(apart(task)),
        "plain autodiff, loss in chunks": lambda task: rivals.plain_chunked(
            apart(task), labels, 1024
        ),
        "plain autodiff, blocks computed again": lambda task: rivals.plain(
            apart(task, "block")
        ),
        "qwix LoraProvider": lambda task: rivals.qwix_lora(apart(task)),
        "flax nnx.LoRA": lambda task: rivals.nnx_lora(config, task),
        "full fine-tuning": lambda task: contenders.full_step(
            scanned.clone(remat="lora"), task.params["stack"], batch
        ),
        FLOOR: lambda task: rivals.matmuls(task.params["apart"], labels.size),
    }
    targets = adapt(model, LoRAConfig(RANK, ALPHA), *inputs).targets(params)
    kernels = sum(math.prod(target.kernel_shape) for target in targets)
    adapters = sum(target.trainable for target in targets)
    head = config.hidden_size * config.vocab_size
    formula = labels.size * (4 * kernels + 6 * adapters + 4 * head)
    shape = f"{spec.name}, {spec.batch} x {spec.length:,} tokens"
    return shape, task, float(formula), makers


def _encoder(spec: specs.EncoderSpec) -> Model:
    task, ids, _ = contenders.encoder_task(spec)
    makers = _own(exclude=["classifier"])
    makers["qwix LoraProvider"] = rivals.qwix_lora
    makers[FLOOR] = lambda task: rivals.matmuls(task.params, ids.size)
    return spec.name, task, None, makers


def _layer(spec: specs.DenseSpec) -> Model:
    task, _, _ = contenders.layer_task(spec)
    makers = _own() | {f"{OURS}, DoRA": _own(dora=True)[OURS]}
    makers["qwix LoraProvider"] = rivals.qwix_lora
    makers["flax nnx.LoRA"] = lambda task: rivals.nnx_layer(spec.width, task)
    n = spec.width  # the input needs no gradient: no product with the transpose of W
    formula = spec.tokens * (2 * n * n + 10 * n * RANK)
    return f"{spec.name}, {spec.tokens:,} tokens, alone", task, float(formula), makers


def _own(**options: Any) -> dict[str, Make]:
    names = (OURS, "plain autodiff", "full fine-tuning")
    return {
        name: lambda task, name=name: contenders.own(task, **options)[name]()
        for name in names
    }


def _params(model: Any, *inputs: jax.Array) -> Any:
    """Returns the shapes of a model's parameters, in the dtype of the base."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, rivals.dtype()), params)
