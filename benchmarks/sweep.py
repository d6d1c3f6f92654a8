"""Runs of a sweep side by side, against one after another.

First whole runs, as a user has them: `lora-jax sweep` over 8 learning rates against 8
times `lora-jax train`, each with its start. Then a step alone: of 8 runs or 2 at once
against a step of each in turn, timed alternately. The last columns are how many runs a
sweep would take together, the gain from that, and the most that the base's matrix
products allow: the steps in turn against those products alone, of the rows of 8 runs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, specs
from benchmarks.harness import Contender, alternate, measured
from benchmarks.rivals import ALPHA, RANK, dtype
from experiments.fetch import minilm
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    classification_loss,
    lora_optimizer,
    make_lm_loss,
    make_train_step,
)
from lora_jax.cli import huge_pages
from lora_jax.finetune.sweep_group import LEAST_GAIN
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.encoder import SequenceClassifier
from lora_jax.train.members import Hyper, member_optimizer
from lora_jax.train.slots import Members
from lora_jax.tree.targets import Target

IN_TURN, PRODUCTS = "one after another", "base products of 8"
OPTIONS: dict[str, Any] = {"learning_rate": 1e-4, "total_steps": 1000}
RUNS, TOGETHER = 8, (8, 2)
ENCODER, DECODER = "MiniLM-L6", "Llama-shaped, d 512, 8 layers"
CASES = (
    (ENCODER, 4, 32),
    (DECODER, 1, 64),
    (ENCODER, 1, 16),
    (DECODER, 1, 16),
    (ENCODER, 8, 32),
)
STEPS = 50  # of each whole run
WORDS = ("the", "film", "is", "a", "lovely", "and", "quiet", "story", "of", "two")
Parts = tuple[Any, Any, Any, dict[str, np.ndarray]]  # adapted, loss, params, a batch


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all shapes.

    Args:
      quick: only the first two steps, with fewer samples.

    Returns:
      A row for the whole runs, and one per model and batch.
    """
    huge_pages.keep_freed()  # as `lora-jax sweep` does
    rows = [] if quick else [_whole_runs()]
    for model, b, t in CASES[: 2 if quick else None]:
        parts = (_encoder if model == ENCODER else _decoder)(b, t)
        timed = _timed(parts, 3 if quick else 11)
        beside = round(os.getloadavg()[0], 1)  # of other programs too
        rows.append({"shape": f"{model}, {b} x {t} tokens", "load": beside, **timed})
    return rows


def _whole_runs() -> dict[str, Any]:
    """Times commands on MiniLM, each way with an empty cache of compiled programs."""
    rates = [f"{x:g}" for x in np.geomspace(1e-4, 3e-3, RUNS)]
    rng = np.random.default_rng(0)
    lines = [
        {"text": " ".join(rng.choice(WORDS, 30)), "label": i % 2} for i in range(480)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
        settings = {
            "model": {"path": str(minilm())},
            "data": {"train": "data.jsonl", "holdout": 0.1},
            "lora": {"rank": RANK, "alpha": ALPHA},
            "train": {"batch_size": 4, "max_steps": STEPS},
            "output": {"dir": "run"},
        }
        (folder / "job.yaml").write_text(json.dumps(settings))  # JSON is YAML

        def command(*words: str, cache: str) -> float:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "lora_jax.cli.main", *words],
                cwd=folder,
                env={**os.environ, "LORA_JAX_CACHE": str(folder / cache)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return time.perf_counter() - start

        sweep = command(
            "sweep",
            "job.yaml",
            f"train.learning_rate={','.join(rates)}",
            "output.dir=sweep",
            cache="a",
        )
        alone = [
            command(
                "train",
                "job.yaml",
                f"train.learning_rate={rate}",
                f"output.dir=run-{rate}",
                cache="b",
            )
            for rate in rates
        ]
        record = json.loads((folder / "sweep" / "sweep.json").read_text())
    return {
        "shape": f"{ENCODER}, 4 x 32 tokens: whole runs of {STEPS} steps",
        "load": round(os.getloadavg()[0], 1),
        "sweep_seconds": round(sweep, 1),
        "alone_seconds": [round(x, 1) for x in alone],
        "together": record["together"]["0"],
    }


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
        for key in jax.random.split(jax.random.key(0), RUNS)
    ]

    def in_turn() -> Any:
        metrics = {}
        for i, state in enumerate(states):
            states[i], metrics = step(state, batch)
        return metrics

    targets = adapted.targets(params)
    hyper = Hyper.of(targets, **OPTIONS)
    variables = adapted.attach(params, jax.random.key(0))
    state = TrainState.create(variables, member_optimizer(hyper), jax.random.key(0))

    def together(count: int) -> Contender:
        members = Members(loss_fn, 1, state, hyper, count)
        batches = dict.fromkeys(range(count), batch)
        lowered = members.trace(members.state, members.shapes(batch)).lower()

        def run() -> Any:
            return [members.step(batches) for _ in range(RUNS // count)]

        return measured(lowered, run)

    products, weights = _products(params, targets, batch["input_ids"].size)
    timed = alternate(
        {
            IN_TURN: measured(step.lower(states[0], batch), in_turn),
            PRODUCTS: measured(products.lower(*weights), lambda: products(*weights)),
            **{f"{count} at once": together(count) for count in TOGETHER},
        },
        rounds,
    )
    gains = {}
    for name, found in timed.items():
        pairs = zip(timed[IN_TURN]["ms"], found["ms"], strict=True)
        gains[name] = np.percentile([x / y for x, y in pairs], [50, 25, 75])
    return {**timed, "gains": {k: v.round(3).tolist() for k, v in gains.items()}}


def _products(params: Any, targets: list[Target], tokens: int) -> tuple[Any, Any]:
    """Returns ``x W0`` and ``dy W0ᵀ`` of the layers for 8 runs' rows; its arguments."""
    shapes = []
    for target in targets:
        *layers, i, o = target.kernel_shape
        shapes += [(i, o)] * int(np.prod(layers))
    if "head" in params:
        shapes.append(params["head"]["kernel"].shape)
    arrays = {n: jnp.ones((RUNS * tokens, n)) for n in {n for s in shapes for n in s}}
    kernels = [jnp.ones(shape) for shape in shapes]

    def run(arrays: dict[int, jax.Array], kernels: list[jax.Array]) -> list[jax.Array]:
        both = [(arrays[w.shape[0]] @ w, arrays[w.shape[1]] @ w.T) for w in kernels]
        return [jnp.sum(y) for pair in both for y in pair]

    return jax.jit(run), (arrays, kernels)


def chosen(row: dict[str, Any]) -> int:
    """Returns how many runs a sweep trains side by side, by its own rule."""
    for count in TOGETHER:
        ms, alone = row[f"{count} at once"]["median_ms"], row[IN_TURN]["median_ms"]
        if ms < LEAST_GAIN * alone:
            return count
    return 1


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| model and batch of a run | ms, 8 steps in turn | gain of 8 at once | "
        "of 2 | a sweep takes | its gain | most possible |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = [row for row in rows if "sweep_seconds" in row]
    for row in rows:
        if row in whole:
            continue
        gains, count = row["gains"], chosen(row)
        shown = [f"{row[IN_TURN]['median_ms']:,.0f}"]
        for number in TOGETHER:
            median, low, high = gains[f"{number} at once"]
            shown.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
        own = gains[f"{count} at once"][0] if count > 1 else 1.0
        shown += [str(count), f"{own:.2f}", f"{gains[PRODUCTS][0]:.2f}"]
        lines.append(f"| {row['shape']} | {' | '.join(shown)} |")
    if whole:
        lines += [
            "\n| 8 runs | s, a command for each | s, a sweep | gain |",
            "|---" * 4 + "|",
        ]
    for row in whole:
        alone, swept = sum(row["alone_seconds"]), row["sweep_seconds"]
        cells = (row["shape"], f"{alone:.0f}", f"{swept:.0f}", f"{alone / swept:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
