"""One LoRA step of a decoder and of an encoder: this library, and others, turn by turn.

Same sizes, batch, dtype, rank and targets; Adam on the adapters. A contender that isn't
installed is left out, with a note. Our decoders are scanned blocks, as `lora-jax train`
has them. qwix and plain autodiff run on this library's own models, with its attention;
nnx.LoRA on the same decoder written for NNX, PEFT on transformers' Llama and BERT,
eager and compiled.
"""

import dataclasses
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
from benchmarks.harness import Contender, alternate, measured
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    make_lm_loss,
    make_train_step,
    softmax_cross_entropy,
)
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.models.encoder import SequenceClassifier

CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=1408,
    max_positions=2048,
    ropes=(Rope(10000.0, 64),),
    layer_ropes=(0,) * 8,
)
LARGER = dataclasses.replace(
    CONFIG, hidden_size=1024, num_heads=16, num_kv_heads=16, mlp_size=2816
)
RANK, ALPHA, RATE = 8, 16, 1e-3
PEFT_LORA = {"r": RANK, "lora_alpha": ALPHA}
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
OURS = "lora_jax"
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


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all contenders that are installed.

    Args:
      quick: the smallest decoder alone, fewer samples.

    Returns:
      One row a model: the samples of each contender, and who is missing.
    """
    rows = [_decoders("Llama-shaped, d 512, 8 layers", CONFIG, 4, quick)]
    if not quick:
        rows.append(_decoders("Llama-shaped, d 1024, 8 layers", LARGER, 2, quick))
        rows += [_encoders(spec) for spec in specs.ENCODERS]
    return rows


def _decoders(name: str, config: DecoderConfig, rows: int, quick: bool) -> dict:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, 257))
    batch = lm_batch(ids)
    task = lm_task(config, batch)
    makers: Makers = {
        OURS: lambda: ours(config, "lora", batch),
        f"{OURS}, remat none": lambda: ours(config, "none", batch),
        f"{OURS}, remat block": lambda: ours(config, "block", batch),
        "full fine-tuning": lambda: _full_decoder(config, batch),
        "plain autodiff": lambda: plain(task),
        "flax nnx.LoRA": lambda: _nnx(config, task),
    }
    shape = f"{name}, {rows} x 256 tokens"
    return _alternate(
        shape, makers, task, lambda: torch_peft.llama(config, ids), quick=quick
    )


def _encoders(spec: specs.EncoderSpec) -> dict:
    rng = np.random.default_rng(0)
    shape = (spec.batch, spec.length)
    ids = rng.integers(0, spec.config.vocab_size, shape)
    labels = rng.integers(0, 2, spec.batch)
    model = SequenceClassifier(spec.config, num_labels=2)
    inputs = (jnp.asarray(ids, jnp.int32), jnp.ones(shape, jnp.int32))
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    task = Task(model, params, inputs, _mean_loss(jnp.asarray(labels)))

    def step(module, variables):
        def loss_fn(variables, batch, rngs):
            del rngs
            logits = module.apply(variables, *batch["inputs"])
            return (*softmax_cross_entropy(logits, batch["labels"]), {})

        batch = {"inputs": inputs, "labels": jnp.asarray(labels)}
        return _trained(loss_fn, variables, batch)

    def adapted():
        module = adapt(model, LoRAConfig(RANK, ALPHA, exclude=["classifier"]), *inputs)
        return step(module, module.attach(params, jax.random.key(1)))

    makers: Makers = {
        OURS: adapted,
        "full fine-tuning": lambda: step(model, {"params": params}),
        "plain autodiff": lambda: plain(task),
    }
    return _alternate(
        spec.name, makers, task, lambda: torch_peft.bert(spec, ids, labels)
    )


def _alternate(
    shape: str, makers: Makers, task: Task, torch: Callable, quick: bool = False
) -> dict[str, Any]:
    """Adds those contenders that are installed, and times all."""
    missing = []
    if importlib.util.find_spec("qwix"):
        makers["qwix LoraProvider"] = lambda: _qwix(task)
    else:
        missing.append("qwix")
    if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
        peft = functools.partial(torch_peft.contender, lora=PEFT_LORA, rate=RATE)
        makers["PEFT on torch, eager"] = lambda: peft(*torch())
        if not quick:  # its compiler takes minutes
            makers["PEFT on torch, compiled"] = lambda: peft(*torch(), compiles=True)
    else:
        missing.append("peft")
    contenders = {name: make() for name, make in makers.items()}
    rows = alternate(contenders, rounds=5 if quick else 11)
    return {"shape": shape, **rows, "missing": missing}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        ours = row[OURS]
        lines += [
            f"{row['shape']}, rank {RANK} on all linears, float32:\n",
            "| contender | ms a step (quartiles) | lora_jax / it | temporaries | "
            "trained |",
            "|---|---|---|---|---|",
        ]
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            bytes_ = found["temp_bytes"]
            lines.append(
                f"| {name} | {found['median_ms']:.0f} ({low:.0f}–{high:.0f}) | "
                f"{ours['median_ms'] / found['median_ms']:.2f} | "
                f"{f'{bytes_ / 1e6:.0f} MB' if bytes_ else '–'} | "
                f"{found['trained']:,} |"
            )
        if row["missing"]:
            lines.append(f"\nNot installed, left out: {', '.join(row['missing'])}.")
        lines.append("")
    return "\n".join(lines[:-1])


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


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
    model = Decoder(config)
    ids = batch["input_ids"]
    return Task(model, init(model, ids), (ids,), _mean_loss(batch["labels"]))


def _mean_loss(labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
    def loss(logits):
        total, weight = softmax_cross_entropy(logits, labels)
        return total / weight

    return loss


def init(model: nn.Module, ids: jax.Array) -> Any:
    """Draws the parameters of a decoder."""
    return jax.jit(model.init)(jax.random.key(0), ids)["params"]


def ours(config: DecoderConfig, remat: str, batch: Any, **options: Any) -> Contender:
    """This library's step on scanned blocks; ``options`` are `measured`'s."""
    model = Decoder(config, is_scanned=True, remat=remat)
    adapted = adapt(model, LoRAConfig(RANK, ALPHA), batch["input_ids"])
    variables = adapted.attach(init(model, batch["input_ids"]), jax.random.key(1))
    loss_fn = make_lm_loss(adapted, is_tied=False)
    return _trained(loss_fn, variables, batch, **options)


def _full_decoder(config: DecoderConfig, batch: Any) -> Contender:
    model = Decoder(config, is_scanned=True, remat="lora")
    variables = {"params": init(model, batch["input_ids"])}
    return _trained(make_lm_loss(model, is_tied=False), variables, batch)


def _trained(loss_fn: Any, variables: Any, batch: Any, **options: Any) -> Contender:
    tx = optax.adam(RATE)
    state = TrainState.create(variables, tx, jax.random.key(0))
    step = make_train_step(loss_fn, tx)
    return _stepper(step, state, batch, trained=_count(state.trainable), **options)


def _by_autodiff(
    forward: Callable, adapters: Any, task: Task, **options: Any
) -> Contender:
    """Adam on ``adapters`` for ``forward(adapters) -> outputs``, all by JAX."""
    tx = optax.adam(RATE)

    @jax.jit
    def step(state):
        adapters, opt_state = state
        value, gradient = jax.value_and_grad(lambda a: task.loss(forward(a)))(adapters)
        updates, opt_state = tx.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), value

    state = (adapters, tx.init(adapters))
    return _stepper(step, state, trained=_count(adapters), **options)


def plain(task: Task, **options: Any) -> Contender:
    """``x W + s (x A) B`` as anyone would write it, differentiated by JAX."""
    config = LoRAConfig(RANK, ALPHA, targets=_linears(task.params))
    adapted = adapt(task.model, config, *task.inputs)
    adapters = adapted.attach(task.params, jax.random.key(1))["lora"]

    def forward(adapters):
        def intercept(next_fun, args, kwargs, context):
            y, node = next_fun(*args, **kwargs), adapters
            if not isinstance(context.module, nn.Dense):
                return y
            for name in context.module.path:
                node = node.get(name, {})
            if not node:
                return y
            return y + ALPHA / RANK * (args[0] @ node["lora_a"]) @ node["lora_b"]

        with nn.intercept_methods(intercept):
            return task.model.apply({"params": task.params}, *task.inputs)

    return _by_autodiff(forward, adapters, task, **options)


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
    fresh = lora_model.init(jax.random.key(1), *task.inputs)["params"]
    is_adapter = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" in jax.tree_util.keystr(path), fresh
    )
    leaves, treedef = jax.tree.flatten(fresh)
    flags = jax.tree.leaves(is_adapter)
    adapters = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    frozen = [x for x, flag in zip(leaves, flags, strict=True) if not flag]

    def forward(adapters):
        moving, still = iter(adapters), iter(frozen)
        joined = [next(moving) if flag else next(still) for flag in flags]
        return lora_model.apply({"params": treedef.unflatten(joined)}, *task.inputs)

    return _by_autodiff(forward, adapters, task)


def _nnx(config: DecoderConfig, task: Task) -> Contender:
    from flax import nnx

    from benchmarks.nnx_decoder import NnxDecoder

    model = NnxDecoder(config, RANK, nnx.Rngs(0))
    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def forward(adapters):
        return nnx.merge(graph, adapters, frozen)(*task.inputs)

    return _by_autodiff(forward, adapters, task)
