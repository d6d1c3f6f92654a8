"""One LoRA step of a decoder, an encoder and a layer: this library, and others.

They take turns. Same sizes, batch, dtype, rank and targets; Adam on the adapters.
A contender that isn't installed is left out, with a note. Our decoders are scanned
blocks, as `lora-jax train` has them. qwix and plain autodiff run on this library's own
models, with its attention; nnx.LoRA on the same decoder written for NNX, PEFT on
transformers' Llama and BERT, eager and compiled. The base is float32 on a CPU, bfloat16
elsewhere. Beside them stands what no step does without: the base's matmuls, forward and
for the gradient of their inputs, and nothing else.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import specs, torch_peft
from benchmarks.harness import Contender, alternate, is_on_cpu, measured
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    make_lm_loss,
    make_train_step,
    softmax_cross_entropy,
)
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.encoder import SequenceClassifier

CONFIG = specs.SMALL
RANK, ALPHA, RATE = 8, 16, 1e-3
PEFT_LORA = {"r": RANK, "lora_alpha": ALPHA}
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
OURS, FLOOR = "lora_jax", "no LoRA: the base's matmuls alone"
Makers = dict[str, Callable[[], Contender]]


class Task(NamedTuple):
    """A model and a batch, for the contenders that JAX differentiates.

    Attributes:
      model: with no LoRA inside.
      params: its parameters.
      inputs: arguments of its call.
      loss: of what the call returns.
    """

    model: nn.Module
    params: Any
    inputs: tuple[jax.Array, ...]
    loss: Callable[[jax.Array], jax.Array]


class Layer(nn.Module):
    """One dense layer, ``[t, n]`` to ``[t, n]``.

    Attributes:
      width: ``n``.
      dtype: of the computation.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x W``."""
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="query")(x)


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all contenders that are installed.

    Args:
      quick: the first decoder alone beside plain autodiff and PEFT, fewer samples.

    Returns:
      One row a model: the samples of each contender, and who is missing.
    """
    decoders = decoder_specs()
    rows = [_decoders(spec, quick) for spec in (decoders[:1] if quick else decoders)]
    if not quick:
        rows += [_encoders(spec) for spec in specs.ENCODERS]
        rows += [_layers(spec) for spec in specs.DENSE[1:]]
    return rows


def decoder_specs() -> tuple[specs.DecoderSpec, ...]:
    """Returns the decoders that suit this device, that with fewest layers first."""
    return specs.CPU_DECODERS if is_on_cpu() else specs.ACCELERATOR_DECODERS


def dtype() -> Any:
    """Returns the dtype of the base and of the computation."""
    return jnp.float32 if is_on_cpu() else jnp.bfloat16


def _decoders(spec: specs.DecoderSpec, quick: bool) -> dict:
    config, shape = spec.config, (spec.batch, spec.length + 1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    batch = lm_batch(ids)
    task = lm_task(config, batch)

    makers: Makers = {
        OURS: lambda: ours(config, "lora", batch),
        "plain autodiff": lambda: plain(task),
    }
    if not quick:
        makers |= {
            f"{OURS}, remat none": lambda: ours(config, "none", batch),
            f"{OURS}, remat block": lambda: ours(config, "block", batch),
            "full fine-tuning": lambda: _full_decoder(config, batch),
            "flax nnx.LoRA": lambda: _nnx(config, task),
        }
    if not is_on_cpu():  # there a loop's slices of W0 cost something
        makers[f"{OURS}, unrolled"] = lambda: _lm_step(task.model, task.params, batch)
    makers[FLOOR] = lambda: _matmuls(task.params, spec.batch * spec.length)
    name = f"{spec.name}, {spec.batch} x {spec.length:,} tokens"
    return _alternate(
        name, makers, task, lambda: torch_peft.llama(config, ids), quick=quick
    )


def _encoders(spec: specs.EncoderSpec) -> dict:
    rng = np.random.default_rng(0)
    shape = (spec.batch, spec.length)
    ids = rng.integers(0, spec.config.vocab_size, shape)
    labels = rng.integers(0, 2, spec.batch)
    model = SequenceClassifier(spec.config, num_labels=2, dtype=dtype())
    inputs = (jnp.asarray(ids, jnp.int32), jnp.ones(shape, jnp.int32))
    task = Task(model, init(model, *inputs), inputs, _mean_loss(jnp.asarray(labels)))
    makers = _own(task, exclude=["classifier"])
    makers[FLOOR] = lambda: _matmuls(task.params, ids.size)
    return _alternate(
        spec.name, makers, task, lambda: torch_peft.bert(spec, ids, labels)
    )


def _layers(spec: specs.DenseSpec) -> dict:
    """A layer that is trained alone, on the squared error."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, spec.tokens, spec.width), np.float32)
    model, inputs = Layer(spec.width, dtype()), (jnp.asarray(x, dtype()),)
    wanted = jnp.asarray(y)

    def loss(output: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(output.astype(jnp.float32) - wanted))

    task = Task(model, init(model, *inputs), inputs, loss)
    makers = _own(task) | {"flax nnx.LoRA": lambda: _nnx_layer(spec.width, task)}
    name = f"{spec.name}, {spec.tokens:,} tokens, alone"
    return _alternate(
        name, makers, task, lambda: torch_peft.layer(spec.width, x, y), calls=5
    )


def _own(task: Task, **options: Any) -> Makers:
    """Our step, full fine-tuning and plain autodiff of any model."""
    adapted = adapt(task.model, LoRAConfig(RANK, ALPHA, **options), *task.inputs)

    def step(module: Any, variables: Any) -> Contender:
        def loss_fn(variables, inputs, rngs):
            del rngs
            return task.loss(module.apply(variables, *inputs)), jnp.float32(1), {}

        return _trained(loss_fn, variables, task.inputs)

    return {
        OURS: lambda: step(adapted, adapted.attach(task.params, jax.random.key(1))),
        "full fine-tuning": lambda: step(task.model, {"params": _copy(task.params)}),
        "plain autodiff": lambda: plain(task),
    }


def _alternate(
    shape: str,
    makers: Makers,
    task: Task,
    torch: Callable,
    quick: bool = False,
    calls: int = 1,
) -> dict[str, Any]:
    """Adds those contenders that are installed, and times all."""
    missing = []
    if importlib.util.find_spec("qwix") is None:
        missing.append("qwix (not installed)")
    elif not quick:
        makers["qwix LoraProvider"] = lambda: _qwix(task)
    if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
        peft = functools.partial(torch_peft.contender, lora=PEFT_LORA, rate=RATE)
        makers["PEFT on torch, eager"] = lambda: peft(*torch())
        if not quick:  # its compiler takes minutes
            makers["PEFT on torch, compiled"] = lambda: peft(*torch(), compiles=True)
    else:
        missing.append("PEFT (not installed)")
    contenders = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except RuntimeError as error:  # out of memory, for XLA and for torch
            if name == OURS:
                raise
            missing.append(f"{name} ({str(error).splitlines()[0]})")
    timed = alternate(contenders, rounds=3 if quick else 11, calls=calls)
    kind = jnp.dtype(dtype()).name
    return {"shape": shape, "dtype": kind, **timed, "missing": missing}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        ours = row[OURS]
        lines += [
            f"{row['shape']}, rank {RANK} on all linears, {row['dtype']}:\n",
            "| contender | ms a step (quartiles) | lora_jax / it | temporaries | "
            "trained |",
            "|---|---|---|---|---|",
        ]
        digits = 0 if ours["median_ms"] >= 100 else 1 if ours["median_ms"] >= 10 else 2
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            bytes_ = found["temp_bytes"]
            lines.append(
                f"| {name} | {found['median_ms']:.{digits}f} "
                f"({low:.{digits}f}–{high:.{digits}f}) | "
                f"{ours['median_ms'] / found['median_ms']:.2f} | "
                f"{f'{bytes_ / 1e6:,.0f} MB' if bytes_ else '–'} | "
                f"{found['trained']:,} |"
            )
        if row["missing"]:
            lines.append(f"\nLeft out: {', '.join(row['missing'])}.")
        lines.append("")
    return "\n".join(lines[:-1])


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _copy(tree: Any) -> Any:
    """For a step that donates what it trains."""
    return jax.tree.map(jnp.copy, tree)


def _stepper(step: Any, state: Any, *rest: Any, **facts: Any) -> Contender:
    """A contender that is a jitted ``(state, ...) -> (state, loss)``."""
    lowered, holder = step.lower(state, *rest), [state]

    def run() -> Any:
        holder[0], loss = step(holder[0], *rest)
        return loss

    return measured(lowered, run, **facts)


def lm_batch(ids: np.ndarray) -> dict[str, jax.Array]:
    """Returns inputs and labels for ``[b, t + 1]`` token ids."""
    return {
        "input_ids": jnp.asarray(ids[:, :-1], jnp.int32),
        "labels": jnp.asarray(ids[:, 1:], jnp.int32),
        "weights": jnp.ones(ids[:, 1:].shape),
    }


def lm_task(config: DecoderConfig, batch: Mapping[str, jax.Array]) -> Task:
    """Returns next-token prediction by a decoder whose blocks are not scanned."""
    model, ids = Decoder(config, dtype=dtype()), batch["input_ids"]
    return Task(model, init(model, ids), (ids,), _mean_loss(batch["labels"]))


def _mean_loss(labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
    def loss(logits):
        total, weight = softmax_cross_entropy(logits, labels)
        return total / weight

    return loss


@functools.lru_cache(maxsize=2)  # contenders that read one base hold it once
def _init(model: nn.Module, shapes: tuple[Any, ...]) -> Any:
    def draw(key):
        zeros = [jnp.zeros(shape, kind) for shape, kind in shapes]
        params = model.init(key, *zeros)["params"]
        return jax.tree.map(lambda x: x.astype(dtype()), params)

    return jax.jit(draw)(jax.random.key(0))


def init(model: nn.Module, *inputs: jax.Array) -> Any:
    """Draws the parameters of a model, in `dtype`; a model's are drawn once."""
    return _init(model, tuple((x.shape, jnp.result_type(x)) for x in inputs))


def ours(config: DecoderConfig, remat: str, batch: Any, **options: Any) -> Contender:
    """This library's step on scanned blocks; ``options`` are `measured`'s."""
    model = Decoder(config, dtype=dtype(), is_scanned=True, remat=remat)
    return _lm_step(model, _scanned(config, batch), batch, **options)


def _lm_step(model: Decoder, params: Any, batch: Any, **options: Any) -> Contender:
    adapted = adapt(model, LoRAConfig(RANK, ALPHA), batch["input_ids"])
    variables = adapted.attach(params, jax.random.key(1))
    loss_fn = make_lm_loss(adapted, is_tied=False)
    return _trained(loss_fn, variables, batch, **options)


def _full_decoder(config: DecoderConfig, batch: Any) -> Contender:
    model = Decoder(config, dtype=dtype(), is_scanned=True, remat="lora")
    variables = {"params": _copy(_scanned(config, batch))}
    return _trained(make_lm_loss(model, is_tied=False), variables, batch)


def _scanned(config: DecoderConfig, batch: Any) -> Any:
    return init(Decoder(config, dtype=dtype(), is_scanned=True), batch["input_ids"])


def _trained(loss_fn: Any, variables: Any, batch: Any, **options: Any) -> Contender:
    tx = optax.adam(RATE)
    state = TrainState.create(variables, tx, jax.random.key(0))
    step = make_train_step(loss_fn, tx)
    return _stepper(step, state, batch, trained=_count(state.trainable), **options)


def _by_autodiff(
    forward: Callable, adapters: Any, frozen: Any, task: Task, **options: Any
) -> Contender:
    """Adam on ``adapters`` for ``forward(adapters, frozen) -> outputs``, all by JAX."""
    tx = optax.adam(RATE)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen):
        adapters, opt_state = state
        value, gradient = jax.value_and_grad(lambda a: task.loss(forward(a, frozen)))(
            adapters
        )
        updates, opt_state = tx.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), value

    state = (adapters, tx.init(adapters))
    return _stepper(step, state, frozen, trained=_count(adapters), **options)


def plain(task: Task, **options: Any) -> Contender:
    """``x W + s (x A) B`` as anyone would write it, differentiated by JAX."""
    config = LoRAConfig(RANK, ALPHA, targets=_linears(task.params))
    adapted = adapt(task.model, config, *task.inputs)
    adapters = adapted.attach(task.params, jax.random.key(1))["lora"]

    def forward(adapters, params):
        def intercept(next_fun, args, kwargs, context):
            y, node = next_fun(*args, **kwargs), adapters
            if not isinstance(context.module, nn.Dense):
                return y
            for name in context.module.path:
                node = node.get(name, {})
            if not node:
                return y
            a, b = (node[name].astype(y.dtype) for name in ("lora_a", "lora_b"))
            return y + ALPHA / RANK * (args[0] @ a) @ b

        with nn.intercept_methods(intercept):
            return task.model.apply({"params": params}, *task.inputs)

    return _by_autodiff(forward, adapters, task.params, task, **options)


def _matmuls(params: Any, tokens: int) -> Contender:
    """No step, but what none does without: ``x W`` and ``dy Wᵀ`` of every linear."""
    kernels = [
        leaf.reshape(leaf.shape[0], -1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and path[-2].key in (*TARGETS, "head")
    ]

    @jax.jit
    def run(kernels, rows):
        rows = dict(rows)  # by width; each product goes into the next
        for kernel in kernels:
            x = rows[kernel.shape[0]]
            rows[kernel.shape[0]] = (x @ kernel) @ kernel.T
        return rows

    widths = {kernel.shape[0] for kernel in kernels}
    key = jax.random.key(0)
    rows = {i: jax.random.normal(key, (tokens, i), dtype()) for i in widths}
    return measured(run.lower(kernels, rows), lambda: run(kernels, rows), trained=0)


def _linears(params: Any) -> list[str]:
    """Names of the linears that all contenders adapt: those of this model's blocks."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {path[-2].key for path, _ in paths}
    return [name for name in TARGETS if name in names]


def _qwix(task: Task) -> Contender:
    import qwix

    names = "|".join(_linears(task.params))
    rule = qwix.LoraRule(module_path=f".*({names})", rank=RANK, alpha=ALPHA)
    provider = qwix.LoraProvider([rule])
    lora_model = qwix.apply_lora_to_model(task.model, provider)
    fresh = jax.jit(lora_model.init)(jax.random.key(1), *task.inputs)["params"]
    is_adapter = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" in jax.tree_util.keystr(path), fresh
    )
    leaves, treedef = jax.tree.flatten(fresh)
    flags = jax.tree.leaves(is_adapter)
    adapters = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    frozen = [
        x.astype(dtype()) for x, flag in zip(leaves, flags, strict=True) if not flag
    ]

    def forward(adapters, frozen):
        moving, still = iter(adapters), iter(frozen)
        joined = [next(moving) if flag else next(still) for flag in flags]
        return lora_model.apply({"params": treedef.unflatten(joined)}, *task.inputs)

    return _by_autodiff(forward, adapters, frozen, task)


def _nnx(config: DecoderConfig, task: Task) -> Contender:
    from flax import nnx

    from benchmarks.nnx_decoder import NnxDecoder

    return _split_nnx(NnxDecoder(config, RANK, dtype(), nnx.Rngs(0)), task)


def _nnx_layer(width: int, task: Task) -> Contender:
    from flax import nnx

    from benchmarks.nnx_decoder import lora_linear

    return _split_nnx(lora_linear(width, width, RANK, dtype(), nnx.Rngs(0)), task)


def _split_nnx(model: Any, task: Task) -> Contender:
    from flax import nnx

    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def forward(adapters, frozen):
        return nnx.merge(graph, adapters, frozen)(*task.inputs)

    return _by_autodiff(forward, adapters, frozen, task)
