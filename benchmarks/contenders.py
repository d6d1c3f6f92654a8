"""One LoRA training step of a decoder, an encoder and a layer, against other libraries.

The contenders alternate, with the same sizes, batch, dtype, rank and targets, and Adam
on the adapters. Those that aren't installed are skipped with a note. Our decoders have
scanned blocks, as in `lora-jax train`, on both APIs of flax. qwix and plain autodiff
run on this library's models, with its attention; nnx.LoRA, and qwix again, on the same
decoder written for NNX; PEFT on transformers' Llama and BERT, eager and compiled. The
base is float32 on a CPU, bfloat16 elsewhere. A lower bound for any step is included:
only the base's matmuls, in the forward pass and for the input gradients.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax.nnx as lnnx
from benchmarks import specs, torch_peft
from benchmarks.harness import Contender, alternate, is_on_cpu
from benchmarks.nnx_decoder import NnxDecoder, linear
from benchmarks.rivals import (
    ALPHA,
    RANK,
    RATE,
    Task,
    dtype,
    matmuls,
    nnx_layer,
    nnx_lora,
    plain,
    qwix_lora,
    qwix_nnx,
    qwix_nnx_layer,
    stepper,
)
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    count,
    make_lm_loss,
    make_train_step,
    softmax_cross_entropy,
)
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.encoder import SequenceClassifier

CONFIG = specs.SMALL
PEFT_LORA = {"r": RANK, "lora_alpha": ALPHA}
OURS, FLOOR = "lora_jax", "no LoRA: the base's matmuls alone"
ON_NNX, QWIX_NNX = f"{OURS} on NNX", "qwix LoraProvider on NNX"
Makers = dict[str, Callable[[], Contender]]


class Layer(nn.Module):
    """One dense layer, ``[t, n]`` to ``[t, n]``.

    Attributes:
      width: ``n``.
      dtype: computation dtype.
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
      quick: only the first decoder, plain autodiff and PEFT, with fewer samples.

    Returns:
      One row per model: the samples of each contender, and the missing ones.
    """
    decoders = decoder_specs()
    rows = [_decoders(spec, quick) for spec in (decoders[:1] if quick else decoders)]
    if not quick:
        rows += [_encoders(spec) for spec in specs.ENCODERS]
        rows += [_layers(spec) for spec in specs.DENSE[1:]]
    return rows


def decoder_specs() -> tuple[specs.DecoderSpec, ...]:
    """Returns the decoders suitable for this device, fewest layers first."""
    return specs.CPU_DECODERS if is_on_cpu() else specs.ACCELERATOR_DECODERS


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
            f"{OURS}, DoRA": lambda: ours(config, "lora", batch, dora=True),
            "full fine-tuning": lambda: _full_decoder(config, batch),
            ON_NNX: lambda: ours_on_nnx(config, batch),
            "flax nnx.LoRA": lambda: nnx_lora(config, task),
            QWIX_NNX: lambda: qwix_nnx(config, task),
        }
    if not is_on_cpu():  # slicing W0 in a loop has a cost there
        makers[f"{OURS}, unrolled"] = lambda: lm_step(task.model, task.params, batch)
    makers[FLOOR] = lambda: matmuls(task.params, spec.batch * spec.length)
    name = f"{spec.name}, {spec.batch} x {spec.length:,} tokens"
    return _alternate(
        name, makers, task, lambda: torch_peft.llama(config, ids), quick=quick
    )


def _encoders(spec: specs.EncoderSpec) -> dict:
    task, ids, labels = encoder_task(spec)
    makers = own(task, exclude=["classifier"])
    makers[FLOOR] = lambda: matmuls(task.params, ids.size)
    return _alternate(
        spec.name, makers, task, lambda: torch_peft.bert(spec, ids, labels)
    )


def encoder_task(spec: specs.EncoderSpec) -> tuple[Task, np.ndarray, np.ndarray]:
    """Returns classification by an encoder, its token ids and its labels."""
    rng = np.random.default_rng(0)
    shape = (spec.batch, spec.length)
    ids = rng.integers(0, spec.config.vocab_size, shape)
    labels = rng.integers(0, 2, spec.batch)
    model = SequenceClassifier(spec.config, num_labels=2, dtype=dtype())
    inputs = (jnp.asarray(ids, jnp.int32), jnp.ones(shape, jnp.int32))
    loss = mean_loss(jnp.asarray(labels))
    return Task(model, init(model, *inputs), inputs, loss), ids, labels


def _layers(spec: specs.DenseSpec) -> dict:
    """Runs a single layer trained on the squared error."""
    task, x, y = layer_task(spec)
    makers = own(task) | {
        ON_NNX: lambda: our_nnx_layer(spec.width, task),
        "flax nnx.LoRA": lambda: nnx_layer(spec.width, task),
        QWIX_NNX: lambda: qwix_nnx_layer(spec.width, task),
    }
    name = f"{spec.name}, {spec.tokens:,} tokens, alone"
    return _alternate(
        name, makers, task, lambda: torch_peft.layer(spec.width, x, y), calls=5
    )


def layer_task(spec: specs.DenseSpec) -> tuple[Task, np.ndarray, np.ndarray]:
    """Returns a single layer trained on the squared error, its inputs and outputs."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, spec.tokens, spec.width), np.float32)
    model, inputs = Layer(spec.width, dtype()), (jnp.asarray(x, dtype()),)
    wanted = jnp.asarray(y)

    def loss(output: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(output.astype(jnp.float32) - wanted))

    return Task(model, init(model, *inputs), inputs, loss), x, y


def own(task: Task, **options: Any) -> Makers:
    """Our step, full fine-tuning and plain autodiff of any model.

    Args:
      task: the model and its batch.
      **options: passed to `LoRAConfig`.

    Returns:
      A function by name that makes each contender.
    """
    adapted = adapt(task.model, LoRAConfig(RANK, ALPHA, **options), *task.inputs)

    def step(module: Any, variables: Any) -> Contender:
        return _trained(_loss_fn(module, task), variables, task.inputs)

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
    """Adds the contenders that are installed, and times all of them."""
    missing = []
    if importlib.util.find_spec("qwix") is None:
        makers.pop(QWIX_NNX, None)
        missing.append("qwix (not installed)")
    elif not quick:
        makers["qwix LoraProvider"] = lambda: qwix_lora(task)
    if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
        peft = functools.partial(torch_peft.contender, lora=PEFT_LORA, rate=RATE)
        makers["PEFT on torch, eager"] = lambda: peft(*torch())
        if not quick:  # compiling takes minutes
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
        is_counted = "matmul_flops" in ours  # not in older results
        lines += [
            f"{row['shape']}, rank {RANK} on all linears, {row['dtype']}:\n",
            "| contender | ms per step (quartiles) | lora_jax / it | temporaries | "
            + ("GFLOPs of matmuls | " if is_counted else "")
            + "trained |",
            "|---" * (6 if is_counted else 5) + "|",
        ]
        digits = 0 if ours["median_ms"] >= 100 else 1 if ours["median_ms"] >= 10 else 2
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            bytes_, flops = found["temp_bytes"], found.get("matmul_flops")
            lines.append(
                f"| {name} | {found['median_ms']:.{digits}f} "
                f"({low:.{digits}f}–{high:.{digits}f}) | "
                f"{ours['median_ms'] / found['median_ms']:.2f} | "
                f"{f'{bytes_ / 1e6:,.0f} MB' if bytes_ else '–'} | "
                + (
                    f"{f'{flops / 1e9:,.1f}' if flops else '–'} | "
                    if is_counted
                    else ""
                )
                + f"{found['trained']:,} |"
            )
        if row["missing"]:
            lines.append(f"\nNot run: {', '.join(row['missing'])}.")
        lines.append("")
    return "\n".join(lines[:-1])


def _copy(tree: Any) -> Any:
    """Copies arrays for a step that donates them."""
    return jax.tree.map(jnp.copy, tree)


def lm_batch(ids: np.ndarray) -> dict[str, jax.Array]:
    """Returns inputs and labels for ``[b, t + 1]`` token ids."""
    return {
        "input_ids": jnp.asarray(ids[:, :-1], jnp.int32),
        "labels": jnp.asarray(ids[:, 1:], jnp.int32),
        "weights": jnp.ones(ids[:, 1:].shape),
    }


def lm_task(config: DecoderConfig, batch: Mapping[str, jax.Array]) -> Task:
    """Returns next-token prediction with a decoder whose blocks are not scanned."""
    model, ids = Decoder(config, dtype=dtype()), batch["input_ids"]
    return Task(model, init(model, ids), (ids,), mean_loss(batch["labels"]))


def mean_loss(labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns the mean cross-entropy of logits, as a function of them."""

    def loss(logits):
        total, weight = softmax_cross_entropy(logits, labels)
        return total / weight

    return loss


@functools.lru_cache(maxsize=2)  # contenders share one copy of the base
def _init(model: nn.Module, shapes: tuple[Any, ...]) -> Any:
    def draw(key):
        zeros = [jnp.zeros(shape, kind) for shape, kind in shapes]
        params = model.init(key, *zeros)["params"]
        return jax.tree.map(lambda x: x.astype(dtype()), params)

    return jax.jit(draw)(jax.random.key(0))


def init(model: nn.Module, *inputs: jax.Array) -> Any:
    """Initialises the parameters of a model in `dtype`, with caching."""
    return _init(model, tuple((x.shape, jnp.result_type(x)) for x in inputs))


def ours(config: DecoderConfig, remat: str, batch: Any, **options: Any) -> Contender:
    """This library's step on scanned blocks; ``options`` are those of `lm_step`."""
    model = Decoder(config, dtype=dtype(), scan_layers=True, remat=remat)
    return lm_step(model, _scanned(config, batch), batch, **options)


def lm_step(
    model: Decoder, params: Any, batch: Any, *, dora: bool = False, **options: Any
) -> Contender:
    """This library's step of a decoder; ``options`` are passed to `measured`."""
    adapted = adapt(model, LoRAConfig(RANK, ALPHA, dora=dora), batch["input_ids"])
    variables = adapted.attach(params, jax.random.key(1))
    loss_fn = make_lm_loss(adapted, is_tied=False)
    return _trained(loss_fn, variables, batch, **options)


def ours_on_nnx(config: DecoderConfig, batch: Any, **options: Any) -> Contender:
    """This library's step on scanned blocks of NNX."""

    @nnx.jit
    def make():
        return NnxDecoder(config, None, dtype(), nnx.Rngs(0), is_scanned=True)

    lora = LoRAConfig(RANK, ALPHA, exclude=["head"])
    module, variables = lnnx.functional(lnnx.adapt(make(), lora, rngs=nnx.Rngs(1)))
    loss_fn = make_lm_loss(module, is_tied=False)
    return _trained(loss_fn, variables, batch, **options)


def our_nnx_layer(width: int, task: Task) -> Contender:
    """This library's step on one NNX linear."""
    layer = linear(width, width, dtype(), nnx.Rngs(0))
    lora = LoRAConfig(RANK, ALPHA)
    module, variables = lnnx.functional(lnnx.adapt(layer, lora, rngs=nnx.Rngs(1)))
    return _trained(_loss_fn(module, task), variables, task.inputs)


def _loss_fn(module: Any, task: Task) -> Any:
    def loss_fn(variables, inputs, rngs):
        del rngs
        return task.loss(module.apply(variables, *inputs)), jnp.float32(1), {}

    return loss_fn


def _full_decoder(config: DecoderConfig, batch: Any) -> Contender:
    model = Decoder(config, dtype=dtype(), scan_layers=True, remat="lora")
    return full_step(model, _scanned(config, batch), batch)


def full_step(model: Decoder, params: Any, batch: Any) -> Contender:
    """Full fine-tuning of a decoder."""
    loss_fn = make_lm_loss(model, is_tied=False)
    return _trained(loss_fn, {"params": _copy(params)}, batch)


def _scanned(config: DecoderConfig, batch: Any) -> Any:
    return init(Decoder(config, dtype=dtype(), scan_layers=True), batch["input_ids"])


def _trained(loss_fn: Any, variables: Any, batch: Any, **options: Any) -> Contender:
    tx = optax.adam(RATE)
    state = TrainState.create(variables, tx, jax.random.key(0))
    step = make_train_step(loss_fn, tx)
    return stepper(step, state, batch, trained=count(state.trainable), **options)
