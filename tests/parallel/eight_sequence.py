"""A decoder on a mesh of eight devices that splits its rows, against one device.

Run by test_eight_sequence.py in a process of its own. Prints the largest errors of
logits and gradients, a device's part of the token ids, and the arrays on one device
that are as long as a row.
"""

import json
import re

import jax
import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh, shard_batch
from lora_jax.parallel.rules import make_sharding, shard_variables
from lora_jax.train.causal_lm import make_lm_loss

CONFIG = DecoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=24,
    max_positions=64,
    ropes=(Rope(1e4, 4),),
    layer_ropes=(0, None),
    layer_windows=(5, None),
    attention_softcap=3.0,
    has_sinks=True,
    experts=ExpertConfig(4, 3, 8),
)
MESH = {"data": 1, "fsdp": 2, "sequence": 4}
ROWS, TIME = 4, 40


def make_batch() -> dict[str, np.ndarray]:
    """Returns rows whose weights, and examples, differ from device to device."""
    rng = np.random.default_rng(3)
    shape = (ROWS, TIME)
    starts = rng.random(shape) < 0.08
    starts[:, 0] = True
    where = np.where(starts, np.arange(TIME), 0)
    return {
        "input_ids": rng.integers(0, 30, shape, np.int32),
        "labels": rng.integers(0, 30, shape, np.int32),
        "weights": (rng.random(shape) < np.linspace(0.1, 0.9, TIME)).astype("f"),
        "positions": (np.arange(TIME) - np.maximum.accumulate(where, axis=1)).astype(
            "i4"
        ),
        "segment_ids": np.cumsum(starts, axis=1, dtype="i4"),
    }


def main() -> None:
    batch, key = make_batch(), jax.random.key
    module = Decoder(CONFIG, scan_layers=True, remat="lora")
    ids = batch["input_ids"][:1, :4]
    adapted = adapt(module, LoRAConfig(rank=2, alpha=3), ids)
    params = jax.jit(module.init)(key(1), ids)["params"]
    variables = jax.jit(adapted.attach)(params, key(2))
    variables["lora"] = jax.tree.map(lambda a: a + 0.1, variables["lora"])
    loss_fn = make_lm_loss(adapted, is_tied=False)

    def outputs(variables, batch):
        def loss(lora):
            return loss_fn({**variables, "lora": lora}, batch, {})[0]

        rows = (batch[n] for n in ("input_ids", "positions", "segment_ids"))
        logits = adapted.apply(variables, *rows, deterministic=True)
        return logits, jax.value_and_grad(loss)(variables["lora"])

    wanted = jax.jit(outputs)(variables, batch)
    mesh = make_mesh(**MESH)
    placed = shard_variables(variables, make_sharding(mesh), adapted.targets(params))

    @jax.jit
    def run(variables, batch):
        with on_mesh_of(mesh):
            return outputs(variables, batch)

    split = shard_batch(batch, mesh)
    program = run.lower(placed, split).compile()
    found = program(placed, split)
    (logits, rest), (wanted_logits, wanted_rest) = (
        jax.tree.map(np.asarray, x) for x in (found, wanted)
    )
    errors = jax.tree.map(
        lambda a, b: float(abs(a - b).max() / abs(b).max()), rest, wanted_rest
    )
    whole = rf"f32\[{ROWS // 2},{TIME},\d[\d,]*\]"
    report = {
        "logits": float(abs(logits - wanted_logits).max()),
        "loss and gradients": max(jax.tree.leaves(errors)),
        "shard": split["input_ids"].addressable_shards[0].data.shape,
        "whole": re.findall(whole, program.as_text()),
    }
    print(json.dumps(report))  # noqa: T201 - read by the test


if __name__ == "__main__":
    main()
