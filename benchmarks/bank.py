"""Three ways to give every row its own adapter, by tokens a row and size of the bank.

One dense layer of ``d x d``: the update of a batch's rows, each with a random adapter
of the bank, or each of their tokens, as `lora_jax.ops.banked` computes it. Beside it
the layer's own product, and the way that `best_way` takes. On this machine by the
clock; for a TPU v5e by the cycles that its compiler estimates, where ``libtpu`` is
installed (on kernels of many groups the estimate of ``sort`` is an upper limit).
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import alternate, is_on_cpu, measured
from benchmarks.schedule import sum_cycles
from benchmarks.targets import open_target
from lora_jax.ops.banked import WAYS, banked_update, best_way
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh
from lora_jax.plan.slices import uncached

BASE, CHOSEN = "x W0", "chosen"
RANK = 8
CPU_WIDTH, WIDTH = 768, 4096
CASES = (  # rows, tokens of each, whether every token has its own adapter
    (8, 1, False),
    (64, 1, False),
    (8, 16, False),
    (8, 128, False),
    (8, 128, True),
)
ADAPTERS = (2, 8, 32, 128)
TPU = "v5e:2x2"


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all shapes.

    Args:
      quick: fewer samples, shapes and adapters, and no TPU.

    Returns:
      One row for each device, number of rows, tokens and adapters.
    """
    adapters = ADAPTERS[:2] if quick else ADAPTERS
    cases = CASES[:2] if quick else CASES
    shapes = [(*case, m) for case in cases for m in adapters]
    width = CPU_WIDTH if is_on_cpu() else WIDTH
    rows = [_timed(width, *shape, rounds=3 if quick else 15) for shape in shapes]
    if importlib.util.find_spec("libtpu") and is_on_cpu() and not quick:
        rows += [_compiled(*shape) for shape in shapes]
    return rows


def _calls(d: int, b: int, t: int, of_tokens: bool, m: int) -> Iterator[tuple]:
    """Yields the base's product and every way: name, function and argument shapes."""
    dtype = jnp.float32 if is_on_cpu() and d == CPU_WIDTH else jnp.bfloat16
    shapes = ((b, t, d), (m + 1, d, RANK), (m + 1, RANK, d), (d, d))
    x, a, lora_b, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    ids = jax.ShapeDtypeStruct((b, t) if of_tokens else (b,), jnp.int32)
    yield BASE, jnp.matmul, (x, w)
    for way in WAYS:
        yield way, functools.partial(banked_update, way=way), (x, a, lora_b, ids)


def _timed(
    d: int, b: int, t: int, of_tokens: bool, m: int, *, rounds: int
) -> dict[str, Any]:
    key, contenders = jax.random.key(0), {}

    def filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.int32:
            return jax.random.randint(key, shape.shape, 1, m + 1)
        return jax.random.normal(key, shape.shape, shape.dtype)

    for name, function, shapes in _calls(d, b, t, of_tokens, m):
        args, call = [filled(shape) for shape in shapes], jax.jit(function)
        run = functools.partial(call, *args)
        contenders[name] = measured(call.lower(*args), run)
    calls = max(1, 64 // t)  # of a few microseconds each
    found = alternate(contenders, rounds, calls)
    chosen = best_way(b, t, m, of_tokens=of_tokens)
    beside = round(os.getloadavg()[0], 1)  # of other programs too
    facts = {"d": d, "rows": b, "tokens": t, "of_tokens": of_tokens, "adapters": m}
    return {"device": None, **facts, CHOSEN: chosen, "load": beside, **found}


def _compiled(b: int, t: int, of_tokens: bool, m: int) -> dict[str, Any]:
    """Compiles for a chip that is not here."""
    mesh, found = make_mesh(devices=[open_target(TPU)]), {}
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with on_mesh_of(mesh):
        for name, function, shapes in _calls(WIDTH, b, t, of_tokens, m):
            args = [
                jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in shapes
            ]
            lowered = jax.jit(function).lower(*args)
            with uncached():
                text = lowered.compile().as_text() or ""
            found[name] = {"cycles": sum_cycles(text, by_groups=True).total}
        chosen = best_way(b, t, m, of_tokens=of_tokens)
    facts = {"d": WIDTH, "rows": b, "tokens": t, "of_tokens": of_tokens, "adapters": m}
    return {"device": TPU, **facts, CHOSEN: chosen, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown tables, one a device, the fastest way in bold."""
    devices = dict.fromkeys(row["device"] for row in rows)
    return "\n\n".join(
        _table(device, [row for row in rows if row["device"] == device])
        for device in devices
    )


def _table(device: str | None, rows: list[dict[str, Any]]) -> str:
    unit, key = ("ms", "median_ms") if device is None else ("kcycles", "cycles")
    where = "" if device is None else f"One chip of {device}, bfloat16, estimated:\n\n"
    lines = [
        f"{where}| d | rows x tokens | adapters | {unit} {BASE} | "
        f"{' | '.join(f'{unit} {way}' for way in WAYS)} | chosen |",
        "|---" * (5 + len(WAYS)) + "|",
    ]
    for row in rows:
        found = {name: row[name][key] for name in (BASE, *WAYS)}
        if device is not None:
            found = {name: cycles / 1e3 for name, cycles in found.items()}
        best = min(WAYS, key=lambda way, found=found: found[way])
        shown = {name: f"{value:.3g}" for name, value in found.items()}
        shown[best] = f"**{shown[best]}**"
        size = f"{row['rows']} x {row['tokens']}"
        size += ", by token" if row["of_tokens"] else ""
        cells = row["d"], size, row["adapters"], *shown.values(), row[CHOSEN]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
