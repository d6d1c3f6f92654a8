"""A step of m runs over one base, against a step of each of the m runs in turn.

On this machine by the clock; for a TPU v5e by the arithmetic and the memory traffic
that its compiler counts, where ``libtpu`` is installed: the longer of the two at the
chip's peaks, for a decoder of d 4096, 4 of 32 layers, in bfloat16.
"""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, specs
from benchmarks.harness import alternate, is_on_cpu, measured
from benchmarks.rivals import ALPHA, RANK, dtype
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    classification_loss,
    lora_optimizer,
    make_lm_loss,
    make_train_step,
)
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.encoder import SequenceClassifier
from lora_jax.plan.slices import open_slice, uncached
from lora_jax.train.members import Hyper, Members, member_optimizer, members_update

TOGETHER, IN_TURN = "side by side", "one after another"
OPTIONS: dict[str, Any] = {"learning_rate": 1e-4, "total_steps": 1000}
MEMBERS = 8
TPU_MEMBERS, TPU_SHAPE = 16, (1, 64)
# A v5e's bfloat16 FLOPs and HBM bytes a second: https://cloud.google.com/tpu/docs/v5e
PEAK_FLOPS, PEAK_BYTES = 197e12, 819e9
Parts = tuple[Any, Any, Any, dict[str, np.ndarray]]  # adapted, loss, params, a batch


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all shapes.

    Args:
      quick: fewer samples, and no TPU.

    Returns:
      One row per model and batch.
    """
    made = {
        "MiniLM-L6, 4 x 32 tokens": _encoder(4, 32),
        "Llama-shaped, d 512, 8 layers, 1 x 64 tokens": _decoder(1, 64),
    }
    rows = []
    for name, parts in made.items():
        timed = _timed(parts, 3 if quick else 11)
        beside = round(os.getloadavg()[0], 1)  # of other programs too
        rows.append({"shape": name, "m": MEMBERS, "load": beside, **timed})
    if importlib.util.find_spec("libtpu") and is_on_cpu() and not quick:
        rows.append(_on_tpu(*TPU_SHAPE))
    return rows


def _encoder(b: int, t: int) -> Parts:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, specs.MINILM.vocab_size, (b, t)).astype(np.int32)
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones((b, t), np.int32),
        "labels": rng.integers(0, 2, b).astype(np.int32),
        "weights": np.ones(b, np.float32),
    }
    model = SequenceClassifier(specs.MINILM, num_labels=2, dtype=dtype())
    inputs = (jnp.asarray(ids), jnp.ones((b, t), jnp.int32))
    config = LoRAConfig(RANK, ALPHA, train=("classifier",))
    adapted = adapt(model, config, *inputs)
    params = contenders.init(model, *inputs)
    return adapted, classification_loss(adapted), params, batch


def _decoder(b: int, t: int) -> Parts:
    shape = (b, t + 1)
    ids = np.random.default_rng(0).integers(0, specs.SMALL.vocab_size, shape)
    batch = jax.tree.map(np.asarray, contenders.lm_batch(ids))
    model = _scanned(specs.SMALL)
    adapted = adapt(model, LoRAConfig(RANK, ALPHA), batch["input_ids"])
    params = contenders.init(model, jnp.asarray(batch["input_ids"]))
    return adapted, make_lm_loss(adapted, is_tied=False), params, batch


def _scanned(config: DecoderConfig) -> Decoder:
    return Decoder(config, dtype=dtype(), scan_layers=True, remat="lora")


def _timed(parts: Parts, rounds: int) -> dict[str, Any]:
    adapted, loss_fn, params, batch = parts
    tx = lora_optimizer(**OPTIONS)
    step = make_train_step(loss_fn, tx)
    states = [
        TrainState.create(adapted.attach(params, key), tx, key)
        for key in jax.random.split(jax.random.key(0), MEMBERS)
    ]

    def in_turn() -> Any:
        metrics = {}
        for i, state in enumerate(states):
            states[i], metrics = step(state, batch)
        return metrics

    hyper = Hyper.of(adapted.targets(params), **OPTIONS)
    variables = adapted.attach(params, jax.random.key(0))
    state = TrainState.create(variables, member_optimizer(hyper), jax.random.key(0))
    members = Members(loss_fn, 1, state, hyper, MEMBERS)
    batches = dict.fromkeys(range(MEMBERS), batch)
    together = members.trace(members.state, members.shapes(batch)).lower()
    return alternate(
        {
            TOGETHER: measured(together, lambda: members.step(batches)),
            IN_TURN: measured(step.lower(states[0], batch), in_turn),
        },
        rounds,
    )


def _on_tpu(b: int, t: int) -> dict[str, Any]:
    """Compiles both for a v5e chip."""
    model = Decoder(
        specs.ACCELERATOR_DECODERS[0].config,
        dtype=jnp.bfloat16,
        scan_layers=True,
        remat="lora",
    )
    adapted = adapt(model, LoRAConfig(RANK, ALPHA))
    here = jax.sharding.SingleDeviceSharding(open_slice("v5e:2x2")[0])

    def shaped(tree: Any, *lead: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=here),
            tree,
        )

    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    hyper = Hyper.of(adapted.targets(params), **OPTIONS)
    variables = jax.eval_shape(adapted.attach, params, jax.random.key(0))
    loss_fn = make_lm_loss(adapted, is_tied=False)
    batch = {
        name: jax.ShapeDtypeStruct((b, t), kind)
        for name, kind in (("input_ids", jnp.int32), ("labels", jnp.int32))
    }
    batch["weights"] = jax.ShapeDtypeStruct((b, t), jnp.float32)
    row: dict[str, Any] = {
        "shape": f"v5e, d 4096, 4 layers, {b} x {t} tokens",
        "m": TPU_MEMBERS,
    }
    for name, count in ((IN_TURN, 1), (TOGETHER, TPU_MEMBERS)):
        tx = member_optimizer(hyper)
        state = jax.eval_shape(
            lambda v, k, tx=tx: TrainState.create(v, tx, k),
            variables,
            jax.random.key(0),
        )
        update = jax.jit(members_update(loss_fn, 1, count), donate_argnums=0)
        args = (
            shaped(state.changing, count),
            shaped(hyper, count),
            jax.ShapeDtypeStruct((count,), bool, sharding=here),
            shaped(state.frozen),
            shaped(batch, count),
        )
        with uncached():
            cost: Any = update.lower(*args).compile().cost_analysis()
        flops, traffic = cost["flops"], cost["bytes accessed"]
        seconds = max(flops / PEAK_FLOPS, traffic / PEAK_BYTES)
        row[name] = {"flops": flops, "bytes": traffic, "seconds": seconds}
    return row


def gain(row: dict[str, Any]) -> float:
    """Returns how many times faster the runs are side by side."""
    together, alone = row[TOGETHER], row[IN_TURN]
    if "median_ms" in together:
        return alone["median_ms"] / together["median_ms"]
    return row["m"] * alone["seconds"] / together["seconds"]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| model and batch of a run | runs | ms side by side | ms one after another | "
        "gain |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        together, alone = row[TOGETHER], row[IN_TURN]
        if "median_ms" in together:
            shown = [f"{x['median_ms']:,.0f}" for x in (together, alone)]
        else:
            times = (together["seconds"], row["m"] * alone["seconds"])
            shown = [f"{1e3 * x:.1f} (by the compiler's counts)" for x in times]
        columns = (row["shape"], row["m"], *shown, f"{gain(row):.2f}")
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)
