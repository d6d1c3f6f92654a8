"""Trains one tiny decoder on one device and on meshes of eight; prints what it saw.

Run by test_eight_devices.py, in a process of its own: the number of devices is fixed
when JAX starts.
"""

import dataclasses
import json
import re
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.io.checkpoint import Checkpoints
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.names import FROZEN
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.mesh import make_mesh, shard_batch
from lora_jax.parallel.rules import make_sharding, shard_variables
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step
from lora_jax.tree.paths import flatten

STEPS = 20
MESHES = {
    "1x8": {"data": 1, "tensor": 8},
    "8x1": {"data": 8, "tensor": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# Sizes that differ from each other, so that a shape in the HLO says what it is.
CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    mlp_size=80,
    max_positions=64,
    ropes=(Rope(1e4, 2),),
    layer_ropes=(0, 0),
)
MODULE = Decoder(CONFIG, is_scanned=True)
LORA = LoRAConfig(rank=3, alpha=7, targets="all-linear")
ROWS, TIME = 16, 12
COMPILED: list[str] = []  # names of what XLA compiled since it was last emptied


def _on_event(name: str, seconds: float, **_: Any) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


jax.monitoring.register_event_duration_secs_listener(_on_event)


def make_batch(step: int) -> dict[str, np.ndarray]:
    """A batch with masks that differ much between rows, so between devices."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, TIME + 1, ROWS)
    return {
        "input_ids": rng.integers(0, CONFIG.vocab_size, (ROWS, TIME), np.int32),
        "labels": rng.integers(0, CONFIG.vocab_size, (ROWS, TIME), np.int32),
        "weights": (np.arange(TIME) < lengths[:, None]).astype(np.float32),
    }


def setup():
    """Returns the adapted decoder, its variables, loss, optimizer and step."""
    ids = np.zeros((1, 4), np.int32)
    params = MODULE.init(jax.random.key(0), ids)["params"]
    adapted = adapt(MODULE, LORA, ids)
    variables = adapted.attach(params, jax.random.key(1))
    tx = lora_optimizer(1e-2, total_steps=STEPS)
    step = make_train_step(make_lm_loss(adapted, is_tied=False), tx)
    return adapted, variables, tx, step


def host(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def train(state, step, mesh):
    """Returns the state after the steps, and what was seen of them."""
    losses, compiled, before = [], [], shardings(state)
    for number in range(STEPS):
        batch = make_batch(number)
        batch = batch if mesh is None else shard_batch(batch, mesh)
        COMPILED.clear()
        state, metrics = step(state, batch)
        compiled.append(len(COMPILED))
        losses.append(float(metrics["loss"]))
    return state, {
        "losses": losses,
        "compilations": compiled,
        "is_in_place": shardings(state) == before,
    }


def shardings(state):
    return [leaf.sharding for leaf in jax.tree.leaves(state)]


def gathered_shapes(hlo: str) -> list[list[int]]:
    """Returns the shapes that all-gathers of a compiled program make."""
    shapes = []
    for line in hlo.splitlines():
        if made := re.match(r".*?= (.*?) all-gather(-start)?\(", line):
            found = re.findall(r"\w+\[([\d,]+)\]", made[1])
            shapes += [[int(n) for n in dims.split(",")] for dims in found]
    return shapes


def whole_activations(hlo: str) -> list[str]:
    """Returns the shapes ``[rows, time, ...]`` of a program that hold all rows."""
    return sorted(set(re.findall(rf"f32\[{ROWS},{TIME},\d[\d,]*\]", hlo)))


def main() -> None:
    adapted, variables, tx, step = setup()
    targets = adapted.targets(adapted.detach(variables))

    def start(mesh):
        if mesh is None:
            return TrainState.create(variables, tx, jax.random.key(2))
        placed = shard_variables(variables, make_sharding(mesh), targets)
        return TrainState.create(placed, tx, jax.random.key(2))

    alone, seen = train(start(None), step, None)
    wanted = host(alone.trainable)
    folded = host(adapted.merge(alone.variables))
    report: dict[str, Any] = {"losses": seen["losses"], "meshes": {}}
    weights = {p: list(x.shape) for p, x in flatten(variables[FROZEN]).items()}
    report["weights"] = {p: shape for p, shape in weights.items() if len(shape) > 1}
    kept = None
    for name, sizes in MESHES.items():
        mesh = make_mesh(**sizes)
        state = start(mesh)
        COMPILED.clear()
        hlo = step.lower(state, shard_batch(make_batch(0), mesh)).compile().as_text()
        compiled = len(COMPILED)
        specs = {
            path: list(leaf.sharding.spec)
            for path, leaf in flatten(state.variables).items()
        }
        moments = [
            list(leaf.sharding.spec)
            for leaf in jax.tree.leaves(state.opt_state)
            if leaf.ndim
        ]
        state, seen = train(state, step, mesh)
        merged = jax.jit(adapted.merge)(state.variables)
        base = flatten(state.frozen[FROZEN])
        mine = host(state.trainable)
        report["meshes"][name] = {
            **seen,
            "compiled_before": compiled,
            "adapters": max(float(abs(mine[p] - wanted[p]).max()) for p in wanted),
            "specs": specs,
            "moments": moments,
            "gathers": gathered_shapes(hlo),
            "whole_activations": whole_activations(hlo),
            "merged": max(
                float(abs(x - folded[p]).max()) for p, x in host(merged).items()
            ),
            "merge_moved": [
                path
                for path, leaf in flatten(merged).items()
                if not leaf.sharding.is_equivalent_to(base[path].sharding, leaf.ndim)
            ],
        }
        kept = state
    with tempfile.TemporaryDirectory() as folder:
        options = {"config": dataclasses.asdict(LORA), "fingerprint": "base"}
        with Checkpoints(folder, **options) as checkpoints:
            checkpoints.save(kept)  # from the mesh of 2 x 2 x 2
        with Checkpoints(folder, **options) as checkpoints:
            like = start(make_mesh(data=1, tensor=8))
            restored = checkpoints.restore(like)
    saved, back = (host(s.trainable) for s in (kept, restored))
    report["checkpoint"] = {
        "step": int(restored.step),
        "is_equal": all((saved[p] == back[p]).all() for p in saved),
        "is_placed": shardings(restored) == shardings(like),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
