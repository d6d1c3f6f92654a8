"""Trains a tiny decoder on one device and on meshes of eight; prints the results.

Run by test_eight_devices.py in a separate process, since the number of devices is fixed
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
from flax.linen.dtypes import promote_dtype
from jax.sharding import Mesh

from lora_jax.config import LoRAConfig
from lora_jax.files.checkpoint import Checkpoints
from lora_jax.models import decoder, decoder_block
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
# Distinct sizes, so that a shape in the HLO is unambiguous.
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
MODULE = Decoder(CONFIG, scan_layers=True)
TIED = Decoder(dataclasses.replace(CONFIG, is_tied=True))
LORA = LoRAConfig(rank=3, alpha=7, targets="all-linear", dropout_rate=0.3)
ROWS, TIME = 16, 12
COMPILED: list[str] = []  # names of programs compiled since it was last cleared


def _on_event(name: str, seconds: float, **_: Any) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


jax.monitoring.register_event_duration_secs_listener(_on_event)


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Returns a batch with masks that differ between rows, and so between devices."""
    # Seeds with no gradients near 0, where Adam turns rounding into a whole step.
    rng = np.random.default_rng(500 + step)
    lengths = rng.integers(1, TIME + 1, ROWS)
    return {
        "input_ids": rng.integers(0, CONFIG.vocab_size, (ROWS, TIME), np.int32),
        "labels": rng.integers(0, CONFIG.vocab_size, (ROWS, TIME), np.int32),
        "weights": (np.arange(TIME) < lengths[:, None]).astype(np.float32),
    }


def setup(module=MODULE):
    """Returns the adapted decoder, its variables, loss, optimizer and step."""
    ids = np.zeros((1, 4), np.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    adapted = adapt(module, LORA, ids)
    variables = adapted.attach(params, jax.random.key(1))
    tx = lora_optimizer(1e-2, total_steps=STEPS)
    loss = make_lm_loss(adapted, is_tied=module.config.is_tied)
    return adapted, variables, tx, make_train_step(loss, tx)


def start(adapted, variables, tx, mesh) -> TrainState:
    """Returns the state before the first step, on a mesh."""
    targets = adapted.targets(adapted.detach(variables))
    placed = shard_variables(variables, make_sharding(mesh), targets)
    return TrainState.create(placed, tx, jax.random.key(2))


def gathers_of(module) -> dict[str, Any]:
    """Returns a decoder's weights, and the all-gathers of its step on 2 x 2 x 2."""
    adapted, variables, tx, step = setup(module)
    mesh = make_mesh(**MESHES["2x2x2"])
    state = start(adapted, variables, tx, mesh)
    return gathers_in(compiled_text(step, state, mesh), state)


def gathers_in(hlo: str, state: TrainState) -> dict[str, Any]:
    return {
        "weights": {
            path: [list(leaf.shape), list(leaf.sharding.spec)]
            for path, leaf in flatten(state.frozen[FROZEN]).items()
        },
        "gathers": gathered_shapes(hlo),
    }


def compiled_text(step, state, mesh) -> str:
    batch = shard_batch(make_batch(0), mesh)
    return step.lower(state, batch).compile().as_text()


def let_xla_choose() -> None:
    """Removes the sharding constraints of rows and tables."""
    decoder_block.shard_rows = decoder.shard_rows = lambda x: x
    decoder.promote_table = promote_dtype


def host(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def train(state, step, mesh):
    """Returns the state after the steps, and what was recorded."""
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
    """Returns the output shapes of a compiled program's all-gathers."""
    shapes = []
    for line in hlo.splitlines():
        if made := re.match(r".*?= (.*?) all-gather(-start)?\(", line):
            found = re.findall(r"\w+\[([\d,]+)\]", made[1])
            shapes += [[int(n) for n in dims.split(",")] for dims in found]
    return shapes


def activations_of_others(hlo: str, mesh: Mesh) -> list[str]:
    """Returns the shapes ``[rows, time, ...]`` with more rows than one device has."""
    own = ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
    more = "|".join(str(n) for n in range(own + 1, ROWS + 1) if ROWS % n == 0)
    return sorted(set(re.findall(rf"f32\[(?:{more}),{TIME},\d[\d,]*\]", hlo)))


def main() -> None:
    adapted, variables, tx, step = setup()
    state = TrainState.create(variables, tx, jax.random.key(2))
    alone, seen = train(state, step, None)
    wanted = host(alone.trainable)
    folded = host(adapted.merge(alone.variables))
    report: dict[str, Any] = {"losses": seen["losses"], "meshes": {}}
    kept = None
    for name, sizes in MESHES.items():
        mesh = make_mesh(**sizes)
        state = start(adapted, variables, tx, mesh)
        COMPILED.clear()
        hlo = compiled_text(step, state, mesh)
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
        if name == "2x2x2":
            report["scanned"] = gathers_in(hlo, state)
        mine = host(state.trainable)
        report["meshes"][name] = {
            **seen,
            "compiled_before": compiled,
            "adapters": max(float(abs(mine[p] - wanted[p]).max()) for p in wanted),
            "specs": specs,
            "moments": moments,
            "gathers": gathered_shapes(hlo),
            "activations_of_others": activations_of_others(hlo, mesh),
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
            like = start(adapted, variables, tx, make_mesh(data=1, tensor=8))
            restored = checkpoints.restore(like)
    saved, back = (host(s.trainable) for s in (kept, restored))
    report["checkpoint"] = {
        "step": int(restored.step),
        "is_equal": all((saved[p] == back[p]).all() for p in saved),
        "is_placed": shardings(restored) == shardings(like),
    }
    report["tied"] = gathers_of(TIED)
    let_xla_choose()
    report["broken"] = gathers_of(MODULE)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
