"""A LoRA step against a full fine-tuning step with the same code and optimizer.

The formula: per token and ``N x N`` matrix a full step costs ``6 N²`` floating-point
operations, a LoRA step ``4 N² + 12 N r`` (no dW0), a ratio of ``2/3 + 2 r / N``. Adam
needs 8 bytes per trainable parameter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, specs
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    init_adapter,
    lora_dense,
    lora_optimizer,
    make_train_step,
    softmax_cross_entropy,
)
from lora_jax.models.encoder import SequenceClassifier


def compare_dense(spec: specs.DenseSpec, rounds: int) -> dict[str, Any]:
    """Forward and backward of one layer, with the gradient of its input."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (spec.tokens, spec.width))
    kernel = jax.random.normal(keys[1], (spec.width, spec.width)) / spec.width**0.5
    a, b = init_adapter(keys[2], kernel.shape, spec.rank)
    b = jax.random.normal(keys[3], b.shape)
    scaling = 2.0

    @jax.jit
    def lora(x, kernel, a, b):
        layer = functools.partial(lora_dense, kernel=kernel, scaling=scaling)
        y, pull = jax.vjp(lambda x, a, b: layer(x, lora_a=a, lora_b=b), x, a, b)
        return pull(y)

    @jax.jit
    def full(x, kernel):
        y, pull = jax.vjp(jnp.matmul, x, kernel)
        return pull(y)

    # Both compute the same layer: equal outputs if the merged kernel is used.
    dx_lora = np.asarray(lora(x, kernel, a, b)[0])
    dx_full = np.asarray(full(x, kernel + scaling * a @ b)[0])
    error = np.abs(dx_lora - dx_full).max() / np.abs(dx_full).max()
    if error > 1e-4:
        raise AssertionError(f"{spec.name}: gradients differ by {error:.1e}")
    trainable = {"lora": a.size + b.size, "full": kernel.size}
    contenders = {
        "lora": harness.measured(
            lora.lower(x, kernel, a, b),
            lambda: lora(x, kernel, a, b),
            trainable=trainable["lora"],
            optimizer_bytes=8 * trainable["lora"],
        ),
        "full": harness.measured(
            full.lower(x, kernel),
            lambda: full(x, kernel),
            trainable=trainable["full"],
            optimizer_bytes=8 * trainable["full"],
        ),
    }
    timed = harness.alternate(contenders, rounds, calls=3)
    formula = 2 / 3 + 2 * spec.rank / spec.width
    return {"spec": spec.name, "rank": spec.rank, "formula": formula, **timed}


def compare_encoder(spec: specs.EncoderSpec, rounds: int) -> dict[str, Any]:
    """Whole training steps: forward, backward, clipping, Adam."""
    model = SequenceClassifier(spec.config, num_labels=2)
    rng = np.random.default_rng(0)
    shape = (spec.batch, spec.length)
    batch = {
        "input_ids": rng.integers(0, spec.config.vocab_size, shape).astype(np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "labels": rng.integers(0, 2, spec.batch).astype(np.int32),
    }
    inputs = (batch["input_ids"], batch["attention_mask"])
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    config = LoRAConfig(rank=spec.rank, alpha=2.0 * spec.rank, train=["classifier"])
    adapted = adapt(model, config, *inputs)

    def contender(module, variables):
        def loss_fn(variables, batch, rngs):
            del rngs
            logits = module.apply(
                variables, batch["input_ids"], batch["attention_mask"]
            )
            return (*softmax_cross_entropy(logits, batch["labels"]), {})

        tx = lora_optimizer(1e-4, total_steps=1000)
        state = [TrainState.create(variables, tx, jax.random.key(1))]
        step = make_train_step(loss_fn, tx)

        def run():
            state[0], metrics = step(state[0], batch)
            return metrics

        moments = [x for x in jax.tree.leaves(state[0].opt_state) if x.ndim]
        return harness.measured(
            step.lower(state[0], batch),
            run,
            trainable=sum(x.size for x in jax.tree.leaves(state[0].trainable)),
            optimizer_bytes=sum(x.nbytes for x in moments),
        )

    timed = harness.alternate(
        {
            "lora": contender(adapted, adapted.attach(params, jax.random.key(2))),
            "full": contender(model, {"params": params}),
        },
        rounds,
    )
    formula = _encoder_formula(adapted.targets(params))
    return {"spec": spec.name, "rank": spec.rank, "formula": formula, **timed}


def _encoder_formula(targets) -> float:
    """``(4 i o + 6 r (i + o)) / (6 i o)`` summed over the matrices."""
    lora = full = 0
    for target in targets:
        i, o = target.kernel_shape
        full += 6 * i * o
        lora += 4 * i * o + 6 * target.rank * (i + o)
    return lora / full


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all shapes.

    Args:
      quick: fewer samples and no 4096 x 4096 layer.

    Returns:
      One row per shape.
    """
    rounds = 7 if quick else 25
    dense = [s for s in specs.DENSE if not quick or s.width < 4096]
    encoders = specs.ENCODERS[:1] if quick else specs.ENCODERS
    rows = [compare_dense(spec, rounds) for spec in dense]
    return rows + [compare_encoder(spec, rounds) for spec in encoders]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| shape | step time, LoRA / full | FLOPs, LoRA / full | formula "
        "| temporaries, LoRA / full | optimizer bytes, LoRA / full |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lora, full = row["lora"], row["full"]

        def ratio(key, lora=lora, full=full) -> str:
            if not lora[key] or not full[key]:
                return "–"
            return f"{lora[key] / full[key]:.3f}"

        rounds = [a / b for a, b in zip(lora["ms"], full["ms"], strict=True)]
        low, high = np.percentile(rounds, [25, 75])
        optimizer = (
            f"{lora['optimizer_bytes']:,} / {full['optimizer_bytes']:,} "
            f"= {lora['optimizer_bytes'] / full['optimizer_bytes']:.4f}"
        )
        lines.append(
            f"| {row['spec']}, r {row['rank']} | {ratio('median_ms')} "
            f"({low:.2f}–{high:.2f}; {lora['median_ms']:.0f} / "
            f"{full['median_ms']:.0f} ms) | {ratio('flops')} | {row['formula']:.3f} "
            f"| {ratio('temp_bytes')} | {optimizer} |"
        )

    return "\n".join(lines)
