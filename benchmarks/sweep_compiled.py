"""A step of 16 runs over one base, by what the compiler of a TPU v5e counts.

Its time is the longer of arithmetic and memory traffic at the chip's peaks, for a
decoder of d 4096, 4 of 32 layers, in bfloat16. It needs ``libtpu``, and no TPU.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import specs
from benchmarks.rivals import ALPHA, RANK
from lora_jax import LoRAConfig, TrainState, adapt, make_lm_loss
from lora_jax.models.decoder import Decoder
from lora_jax.plan.slices import open_slice, uncached
from lora_jax.train.members import Hyper, member_optimizer, members_update

TOGETHER, IN_TURN = "side by side", "one after another"
MEMBERS, SHAPE = 16, (1, 64)
# A v5e's bfloat16 FLOPs and HBM bytes a second: https://cloud.google.com/tpu/docs/v5e
PEAK_FLOPS, PEAK_BYTES = 197e12, 819e9


def main(quick: bool) -> list[dict[str, Any]]:
    """Compiles both steps.

    Args:
      quick: the same.

    Returns:
      One row.
    """
    del quick
    if not importlib.util.find_spec("libtpu"):
        raise SystemExit('sweep_compiled: pip install "lora_jax[tpu-plan]" first.')
    return [_compile(*SHAPE)]


def _compile(b: int, t: int) -> dict[str, Any]:
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
    hyper = Hyper.of(adapted.targets(params), learning_rate=1e-4, total_steps=1000)
    variables = jax.eval_shape(adapted.attach, params, jax.random.key(0))
    loss_fn = make_lm_loss(adapted, is_tied=False)
    batch = {
        name: jax.ShapeDtypeStruct((b, t), kind)
        for name, kind in (("input_ids", jnp.int32), ("labels", jnp.int32))
    }
    batch["weights"] = jax.ShapeDtypeStruct((b, t), jnp.float32)
    row: dict[str, Any] = {"shape": f"{b} x {t} tokens", "m": MEMBERS}
    for name, count in ((IN_TURN, 1), (TOGETHER, MEMBERS)):
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


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| batch of a run | runs | ms side by side | ms one after another | gain |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        together, alone = row[TOGETHER]["seconds"], row["m"] * row[IN_TURN]["seconds"]
        shown = f"{1e3 * together:.1f} | {1e3 * alone:.1f} | {alone / together:.2f}"
        lines.append(f"| {row['shape']} | {row['m']} | {shown} |")
    return "\n".join(lines)
