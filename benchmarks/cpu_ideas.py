"""What changes to a decoder's step give on a CPU, each beside the step as it is.

Two of the changes leave out work that the model needs, norms and residual sums: they
bound from above what fusing it into the matmuls, or doing it in place, could give.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, rivals, specs
from benchmarks.contenders import OURS
from benchmarks.harness import Contender, alternate
from lora_jax.attention.dot_product import attention
from lora_jax.models import decoder, decoder_block, decoder_parts
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig

SPEC = specs.CPU_DECODERS[0]
FUSED = {"is_qkv_fused": True, "is_gate_up_fused": True}
Patch = Callable[[], Any]


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs the step with each change in turn.

    Args:
      quick: fewer rounds.

    Returns:
      One row, with each change's samples.
    """
    ids = np.random.default_rng(0).integers(
        0, SPEC.config.vocab_size, (SPEC.batch, SPEC.length + 1)
    )
    batch = contenders.lm_batch(ids)
    steps = {
        name: _step(dataclasses.replace(SPEC.config, **options), batch, patch)
        for name, (options, patch) in IDEAS.items()
    }
    return [{"shape": SPEC.name, **alternate(steps, 3 if quick else 15)}]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        base = row[OURS]
        lines += [
            f"{row['shape']}, rank {rivals.RANK} on all linears, float32:\n",
            "| step | ms (quartiles) | / as it is | temporaries |",
            "|---|---|---|---|",
        ]
        for name in IDEAS:
            own = row[name]
            low, high = own["quartiles_ms"]
            ratio = np.median(np.divide(own["ms"], base["ms"]))
            lines.append(
                f"| {name} | {own['median_ms']:.0f} ({low:.0f}–{high:.0f}) | "
                f"{ratio:.2f} | {own['temp_bytes'] / 1e6:,.0f} MB |"
            )
    return "\n".join(lines)


def _step(config: DecoderConfig, batch: Any, patch: Patch) -> Contender:
    """Compiles the step of unrolled blocks, of which a change alters the model."""
    model = Decoder(config, dtype=rivals.dtype())
    params = contenders.init(model, batch["input_ids"])
    with patch():
        return contenders.lm_step(model, params, batch)


def _plain_scores() -> Any:
    def attend(query, key, value, *, scale, **_):
        return attention(query, key, value, is_causal=True, scale=scale)

    return mock.patch.object(decoder_block, "causal_attention", attend)


def _half_residuals() -> Any:
    """Keeps the two inputs of the gate, the largest residuals, in bfloat16."""

    def gate(activation: Any, x: jax.Array, up: jax.Array) -> jax.Array:
        def apply(x, up):
            return activation(x) * up

        @jax.custom_vjp
        def gated(x, up):
            return apply(x, up)

        def forward(x, up):
            return apply(x, up), (x.astype(jnp.bfloat16), up.astype(jnp.bfloat16))

        def backward(kept, dy):
            return jax.vjp(apply, *(y.astype(dy.dtype) for y in kept))[1](dy)

        gated.defvjp(forward, backward)
        return gated(x, up)

    return mock.patch.object(decoder_block, "gate", gate)


def _no_norms() -> Any:
    return mock.patch.object(decoder_parts, "unit_rms", lambda x, eps: x)


def _no_sums() -> Any:
    return mock.patch.object(decoder, "Block", Sequence)


class Sequence(decoder_block.Block):
    """A block without residual sums."""

    @nn.compact
    def run(self, x: Any, place: Any, layer: Any, past: Any = None) -> Any:
        """See `Block.run`."""
        mixer = decoder_block.make_mixer(self.config, self.dtype)
        mlp = decoder_block.make_mlp(self.config, self.dtype, layer)
        y, kept = mixer(self.norm("attention_norm")(x), place, layer, past)
        return mlp(self.norm("mlp_norm")(y)), kept


IDEAS: dict[str, tuple[dict[str, Any], Patch]] = {
    OURS: ({}, contextlib.nullcontext),
    "keeping attention's probabilities, not the softmax's statistics": (
        {},
        _plain_scores,
    ),
    "q, k, v and gate, up as one matmul each": (FUSED, contextlib.nullcontext),
    "inputs of the gate kept in bfloat16": ({}, _half_residuals),
    "without norms: bounds fusing them": ({}, _no_norms),
    "without residual sums: bounds sums in place": ({}, _no_sums),
}
