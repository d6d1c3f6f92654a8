"""A training step as the compilers of TPUs and GPUs see it, without one: an estimate.

The contenders of `benchmarks.contenders` are compiled for one chip in bfloat16, from
shapes: nothing is allocated or run. Memory is that of the executable. Cycles are
libtpu's own estimates, summed by `benchmarks.schedule`, which says what they leave out;
of a GPU there are none, only the kernels that a step launches (`benchmarks.targets`).

A compilation takes minutes, so each result is appended to ``results/compiled.jsonl``,
and a second run continues from there; delete the file to start over. ``--known`` makes
the results file of what has been compiled so far.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import contenders, rivals, specs
from benchmarks.contenders import FLOOR, OURS
from benchmarks.harness import RESULTS, commit
from benchmarks.rivals import ALPHA, RANK, Task
from benchmarks.targets import Make, open_target, price
from lora_jax import LoRAConfig, adapt
from lora_jax.finetune.sections import ModelSettings
from lora_jax.models.decoder import Decoder
from lora_jax.models.experts import Mixture
from lora_jax.names import EXPERTS
from lora_jax.parallel.activation_sharding import on_mesh_of, target_platform
from lora_jax.parallel.mesh import make_mesh
from lora_jax.tree.targets import Target

DONE = RESULTS / "compiled.jsonl"
TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100")  # one chip of each
DECODER = specs.DecoderSpec(
    "Llama-3.1-8B's shape, 4 of 32 layers, vocabulary 32,000",
    dataclasses.replace(specs.ACCELERATOR_DECODERS[0].config, vocab_size=32_000),
    2,
    2048,
)
MOE = specs.DecoderSpec(
    "Qwen3-30B-A3B's shape, 2 of 48 layers of 128 experts, vocabulary 32,000",
    specs.qwen_moe(num_layers=2, vocab_size=32_000),
    2,
    2048,
)
PLAIN, QWIX, NNX = "plain autodiff", "qwix LoraProvider", "flax nnx.LoRA"
CHUNKED = f"{PLAIN}, loss in chunks"
MAIN = (OURS, PLAIN, CHUNKED, QWIX, NNX)  # of the decoder, for targets after the first
Model = tuple[str, Task, float | None, dict[str, Make]]  # name, task, FLOPs, contenders


def main(
    quick: bool, targets: Sequence[str] = TARGETS, known: bool = False
) -> list[dict[str, Any]]:
    """Compiles all contenders for one chip of each target.

    Args:
      quick: only the single layers, for the first target.
      targets: TPU slices, as `lora-jax plan --topology` takes them, and ``"h100"``.
      known: compile nothing, and leave out what earlier runs didn't.

    Returns:
      One row per target and model.

    Raises:
      ValueError: if there is no such target.
      ModuleNotFoundError: if the compiler of a target that was asked for is not
        installed; a default one is left out with a note, unless it is the last.
    """
    devices, absent = {}, []
    for name in targets[:1] if quick else targets:
        try:
            devices[name] = open_target(name)
        except ModuleNotFoundError as error:
            absent.append(error)
    if absent and (targets is not TARGETS or not devices):
        raise absent[0]
    for error in absent:
        print(f"left out: {error}")
    models: list[Callable[[], Model]]
    models = [functools.partial(_layer, spec) for spec in specs.DENSE[1:]]
    if not quick:
        encoders = [functools.partial(_encoder, spec) for spec in specs.ENCODERS]
        decoders = [functools.partial(_decoder, spec) for spec in (DECODER, MOE)]
        mixture = functools.partial(_mixture, MOE)
        models = [*decoders, mixture, *encoders, *models]
    rows = []
    for model in models:
        for name, device in devices.items():
            only = None if name == targets[0] or len(targets) == 1 else MAIN
            rows.append(_row(name, make_mesh(devices=[device]), model, only, known))
    return [row for row in rows if _contenders(row) or not known]


def _row(
    target: str,
    mesh: Mesh,
    build: Callable[[], Model],
    only: Sequence[str] | None,
    known: bool,
) -> dict[str, Any]:
    """Compiles the contenders of one model for one device."""
    with on_mesh_of(mesh):  # what it is built for
        shape, task, formula, makers = build()
    row: dict[str, Any] = {"shape": shape, "target": target, "formula": formula}
    missing = []
    for name, make in makers.items():
        if only is not None and name not in only:
            continue
        find = None if known else functools.partial(price, make, task, mesh)
        try:
            row[name] = once(shape, target, name, find)
        except ModuleNotFoundError as error:
            missing.append(f"{name} ({error.name} is not installed)")
        except KeyError:
            missing.append(f"{name} (not compiled yet)")
    return {**row, "missing": missing}


def once(
    shape: str, target: str, name: str, find: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """Returns the result of a previous run from `DONE`, or finds and adds it.

    Args:
      shape: name of the model.
      target: what it is compiled for.
      name: the contender.
      find: compiles it; None to compile nothing.

    Returns:
      What ``find`` returned, and the commit it was compiled at.

    Raises:
      KeyError: if there is neither a result nor ``find``.
    """
    compiler = "libtpu" if target != "h100" else "jax-cuda12-pjrt"
    versions = {each: importlib.metadata.version(each) for each in ("jax", compiler)}
    asked = {"shape": shape, "target": target, "name": name, "versions": versions}
    for line in DONE.read_text().splitlines() if DONE.exists() else ():
        row = json.loads(line)
        if asked.items() <= row.items():
            return row["found"]
    if find is None:
        raise KeyError(f"{name} has not been compiled for {target}.")
    found = {**find(), "commit": commit()}
    with DONE.open("a") as file:
        file.write(json.dumps({**asked, "found": found}) + "\n")
    print(f"{shape}, {target}, {name}: {found}", flush=True)
    return found


def _decoder(spec: specs.DecoderSpec) -> Model:
    """Next-token prediction; FLOPs of kernels and adapters, without the scores.

    qwix and nnx.LoRA have no adapters for experts.
    """
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

    labels, experts, d = batch["labels"], config.experts, config.hidden_size
    chosen, met, router = 0, 1.0, 0
    if experts is not None:
        chosen, met = experts.num_chosen, experts.active_share
        router = config.num_layers * d * experts.num_experts

    def share(target: Target) -> float:
        return met if f"/{EXPERTS}/" in target.path else 1.0

    first = ModelSettings(spec.name).first_remat(target_platform())  # it fits
    other = "lora" if first == "none" else "none"
    makers: dict[str, Make] = {
        OURS: ours(scanned, "stack", first),
        f"{OURS}, scanned, remat {other}": ours(scanned, "stack", other),
        f"{OURS}, scanned, remat block": ours(scanned, "stack", "block"),
        f"{OURS}, unrolled, remat none": ours(model, "apart", "none"),
        f"{OURS}, unrolled, remat lora": ours(model, "apart", "lora"),
        PLAIN: lambda task: rivals.plain(apart(task)),
        CHUNKED: lambda task: rivals.plain_chunked(apart(task), labels, 1024),
        f"{PLAIN}, blocks computed again": lambda task: rivals.plain(
            apart(task, "block")
        ),
        QWIX: lambda task: rivals.qwix_lora(apart(task)),
        NNX: lambda task: rivals.nnx_lora(config, task),
        "full fine-tuning": lambda task: contenders.full_step(
            scanned.clone(remat="lora"), task.params["stack"], batch
        ),
        FLOOR: lambda task: rivals.matmuls(task.params["apart"], labels.size, chosen),
    }
    targets = adapt(model, LoRAConfig(RANK, ALPHA), *inputs).targets(params)
    kernels = sum(math.prod(target.kernel_shape) * share(target) for target in targets)
    adapters = sum(target.trainable * share(target) for target in targets)
    if experts is not None:
        del makers[QWIX], makers[NNX]
    kernels += router + d * config.vocab_size
    formula = labels.size * (4 * kernels + 6 * adapters)
    shape = f"{spec.name}, {spec.batch} x {spec.length:,} tokens"
    return shape, task, float(formula), makers


def _mixture(spec: specs.DecoderSpec) -> Model:
    """The experts of one layer; its input needs no gradient."""
    config, name = spec.config, spec.name.split("'s")[0]
    experts: Any = config.experts
    tokens = spec.batch * spec.length
    model = Mixture(experts, config.activation, rivals.dtype())
    x = jnp.ones((spec.batch, spec.length, config.hidden_size), rivals.dtype())

    def loss(y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    shape = f"{name}'s {experts.num_experts} experts, {tokens:,} tokens, alone"
    return shape, Task(model, _params(model, x), (x,), loss), None, _own()


def _encoder(spec: specs.EncoderSpec) -> Model:
    task, ids, _ = contenders.encoder_task(spec)
    makers = _own(exclude=["classifier"])
    makers[QWIX] = rivals.qwix_lora
    makers[FLOOR] = lambda task: rivals.matmuls(task.params, ids.size)
    return spec.name, task, None, makers


def _layer(spec: specs.DenseSpec) -> Model:
    task, _, _ = contenders.layer_task(spec)
    makers = _own() | {f"{OURS}, DoRA": _own(dora=True)[OURS]}
    makers[QWIX] = rivals.qwix_lora
    makers[NNX] = lambda task: rivals.nnx_layer(spec.width, task)
    n = spec.width  # the input needs no gradient: no product with the transpose of W
    formula = spec.tokens * (2 * n * n + 10 * n * RANK)
    return f"{spec.name}, {spec.tokens:,} tokens, alone", task, float(formula), makers


def _own(**options: Any) -> dict[str, Make]:
    names = (OURS, PLAIN, "full fine-tuning")
    return {
        name: lambda task, name=name: contenders.own(task, **options)[name]()
        for name in names
    }


def _params(model: Any, *inputs: jax.Array) -> Any:
    """Returns the shapes of a model's parameters, in the dtype of the base."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, rivals.dtype()), params)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown tables, one a model and target."""
    lines = []
    for row in rows:
        is_gpu = any("launches" in found for found in _contenders(row).values())
        key, title = ("microseconds", "ms") if is_gpu else ("cycles", "Mcycles")
        lines += [
            f"{row['shape']}, rank {RANK} on all linears, bfloat16, one chip of "
            f"{row['target']}:\n",
            f"| contender | {title} | lora_jax / it | temporaries | lora_jax / it | "
            f"FLOPs / formula |{' kernels launched |' if is_gpu else ''}",
            f"|---|---|---|---|---|---|{'---|' if is_gpu else ''}",
        ]
        for name, found in _contenders(row).items():
            cells = [name, _count(found, key), _ratio(row.get(OURS, {}), found, key)]
            if needed := found.get("refused_bytes"):
                cells += [f"does not fit: needs {needed / 2**30:.1f} GiB", "–", "–"]
            else:
                share = found["flops"] / row["formula"] if row["formula"] else None
                cells += [
                    f"{found['temp_bytes'] / 1e6:,.1f} MB",
                    _ratio(row.get(OURS, {}), found, "temp_bytes"),
                    f"{share:.3f}" if share else "–",
                ]
            cells += [f"{found['launches']:,}"] if "launches" in found else []
            lines.append(f"| {' | '.join(cells)} |")
        if row["missing"]:
            lines.append(f"\nNot compiled: {', '.join(row['missing'])}.")
        lines.append("")
    return "\n".join(lines[:-1])


def _contenders(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in row.items() if isinstance(found, dict)}


def _count(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    if value is None:
        return "–"
    unknown = found.get("unknown", 0)
    text = f"{value / (1e6 if key == 'cycles' else 1e3):,.3f}"
    return text + (f" + {unknown} kernels" if unknown else "")


def _ratio(ours: dict[str, Any], found: dict[str, Any], key: str) -> str:
    if not ours.get(key) or not found.get(key):
        return "–"
    return f"{ours[key] / found[key]:.2f}"
