"""LoRA on a single layer, in numbers and three plots.

A 10 → 8 layer without bias, whose target differs from its weight by a matrix of rank 3;
Adam trains only A and B. Run it with ``python -m experiments.one_layer.run`` (seconds
on a CPU). ``--api nnx`` trains an adapted `flax.nnx.Linear`, and prints the same table.
"""

import argparse
import functools
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax.nnx as lnnx
from lora_jax import LoRAConfig, init_adapter, lora_dense, merge_kernel

IN, OUT, PLANTED = 10, 8, 3
RANKS = range(1, 9)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = range(5)
STEPS, EXAMPLES = 3_000, 64
HERE = Path(__file__).parent


def make_task(key):
    """Returns inputs, the frozen kernel and the target kernel.

    The inputs are white (``xᵀ x = n I``), so the squared loss is the squared distance
    between kernels, and the optimal rank-r change is the truncated SVD.
    """
    k1, k2, k3, k4 = jax.random.split(key, 4)
    x = jnp.linalg.qr(jax.random.normal(k1, (EXAMPLES, IN)))[0] * EXAMPLES**0.5
    kernel = jax.random.normal(k2, (IN, OUT)) / IN**0.5
    left = jax.random.normal(k3, (IN, PLANTED))
    right = jax.random.normal(k4, (PLANTED, OUT))
    return x, kernel, kernel + left @ right / PLANTED


@functools.partial(jax.jit, static_argnames=("rank", "steps"))
def fit(kernel, x, target, key, alpha, learning_rate, *, rank, steps=STEPS):
    """Trains A and B with Adam; the kernel is never differentiated.

    Returns:
      A, B and the loss before every step.
    """
    scaling = alpha / rank
    y = x @ target

    def loss_fn(adapter):
        prediction = lora_dense(x, kernel, *adapter, scaling=scaling)
        return jnp.mean((prediction - y) ** 2)

    adapter = init_adapter(key, kernel.shape, rank)
    return descend(loss_fn, adapter, learning_rate, steps)


@functools.partial(jax.jit, static_argnames=("alpha", "rank", "steps"))
def fit_nnx(kernel, x, target, key, alpha, learning_rate, *, rank, steps=STEPS):
    """Does the same with an NNX layer that was written without LoRA.

    Returns:
      A, B and the loss before every step.
    """
    layer = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    config = LoRAConfig(rank=rank, alpha=alpha, targets=".*")
    model = lnnx.adapt(layer, config, rngs=nnx.Rngs(1))
    a, b = init_adapter(key, kernel.shape, rank)  # the start of the other API's run
    lnnx.update(model, {"lora": {"lora_a": a, "lora_b": b}})
    graphdef, trained, frozen = nnx.split(model, lnnx.Trained, ...)
    y = x @ target

    def loss_fn(trained):
        model = nnx.merge(graphdef, trained, frozen, copy=True)
        return jnp.mean((model(x) - y) ** 2)

    trained, losses = descend(loss_fn, nnx.to_pure_dict(trained), learning_rate, steps)
    return (trained["lora_a"], trained["lora_b"]), losses


def descend(loss_fn, adapter, learning_rate, steps):
    """Runs Adam with a cosine schedule; returns the adapter and the losses."""
    tx = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def step(carry, _):
        adapter, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state)
        updates = jax.tree.map(lambda u: learning_rate * u, updates)
        return (optax.apply_updates(adapter, updates), opt_state), loss

    (adapter, _), losses = jax.lax.scan(step, (adapter, tx.init(adapter)), length=steps)
    return adapter, losses


def count_table():
    """Returns one row per rank: shapes and counts, against the full layer."""
    rows = []
    for rank in RANKS:
        a, b = init_adapter(jax.random.key(0), (IN, OUT), rank)
        delta = merge_kernel(jnp.zeros((IN, OUT)), a, b, scaling=1.0)
        rows.append(
            {
                "rank": rank,
                "lora_a": a.shape,
                "lora_b": b.shape,
                "A B": delta.shape,
                "trainable": a.size + b.size,
                "full": IN * OUT,
            }
        )
    return rows


def recovery(fit=fit):
    """Fits every rank with every seed; returns distances and SVD bounds."""
    x, kernel, target = make_task(jax.random.key(42))
    before = np.asarray(kernel).copy()
    singular = np.linalg.svd(np.asarray(target - kernel, np.float64), compute_uv=False)
    size = np.linalg.norm(singular)
    rows, curves = [], {}
    keys = jax.vmap(jax.random.key)(jnp.arange(len(SEEDS)))
    for rank in RANKS:
        run = functools.partial(fit, alpha=2.0 * rank, learning_rate=1e-2, rank=rank)
        over_seeds = jax.vmap(run, in_axes=(None, None, None, 0))
        (a, b), losses = over_seeds(kernel, x, target, keys)
        merge = functools.partial(merge_kernel, scaling=2.0)
        merged = jax.vmap(merge, in_axes=(None, 0, 0))(kernel, a, b)
        errors = [float(np.linalg.norm(m - target)) / size for m in np.asarray(merged)]
        rows.append(
            {
                "rank": rank,
                "error": errors,
                "svd_bound": float(np.linalg.norm(singular[rank:]) / size),
            }
        )
        curves[rank] = np.median(np.asarray(losses), axis=0)
    assert np.array_equal(before, kernel), "W0 must not move"
    return rows, curves


def alpha_against_rate():
    """Returns the median final loss for each alpha/r and learning rate, at rank 3."""
    x, kernel, target = make_task(jax.random.key(42))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(SEEDS)))
    run = functools.partial(fit, rank=PLANTED, steps=300)
    run = jax.vmap(run, in_axes=(None, None, None, 0, None, None))  # seeds
    run = jax.vmap(run, in_axes=(None, None, None, None, None, 0))  # learning rates
    run = jax.vmap(run, in_axes=(None, None, None, None, 0, None))  # alphas
    alphas = jnp.array(ALPHAS) * PLANTED  # ALPHAS are values of alpha / r
    _, losses = run(kernel, x, target, keys, alphas, jnp.array(RATES))
    return np.median(np.asarray(losses)[..., -1], axis=-1)  # [alphas, rates]


def plot(rows, curves, grid, folder):
    """Draws the README's three plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ranks = [row["rank"] for row in rows]
    floor = 1e-8
    for seed in SEEDS:
        left.semilogy(
            ranks,
            [max(row["error"][seed], floor) for row in rows],
            "o",
            color="tab:blue",
            alpha=0.5,
            label="Adam on A and B (each seed)" if seed == 0 else None,
        )
    bounds = [max(row["svd_bound"], floor) for row in rows]
    left.semilogy(ranks, bounds, "k_", markersize=16, label="SVD: best of this rank")
    left.axvline(PLANTED, color="grey", linestyle=":", label="rank of the change")
    left.set_xlabel("rank r")
    left.set_ylabel("distance to the planted change / its size")
    left.legend()
    for rank in (1, 2, 3, 4, 8):
        right.semilogy(curves[rank], label=f"r = {rank}")
    right.set_xlabel("step")
    right.set_ylabel("loss (median of seeds)")
    right.legend()
    figure.savefig(folder / "recovery.png", dpi=120)

    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    image = axes.imshow(np.log10(grid), cmap="viridis_r", origin="lower", aspect="auto")
    axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    axes.set_yticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("alpha / r")
    for (i, j), value in np.ndenumerate(np.log10(grid)):
        color = "white" if value > -6 else "black"
        label = f"{value:.1f}"
        axes.text(j, i, label, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="log10 of the loss after 300 steps, r = 3")
    figure.savefig(folder / "alpha.png", dpi=120)


def to_markdown(counts, rows):
    """Returns the README's tables."""
    lines = [
        "| r | A | B | A B | trainable (full: 80) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['rank']} | {c['lora_a']} | {c['lora_b']} | {c['A B']} | "
        f"{c['trainable']} |"
        for c in counts
    ]
    lines += [
        "",
        "| r | distance / size of the change (worst of 5 seeds) | SVD's bound |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['rank']} | {max(r['error']):.2e} | {r['svd_bound']:.2e} |" for r in rows
    ]
    return "\n".join(lines)


def main():
    """Runs everything and writes ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--api", choices=["functions", "nnx"], default="functions")
    args = parser.parse_args()
    if args.api == "nnx":
        print(to_markdown(count_table(), recovery(fit_nnx)[0]))
        return
    folder = args.out
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    counts = count_table()
    rows, curves = recovery()
    grid = alpha_against_rate()
    seconds = time.perf_counter() - start
    plot(rows, curves, grid, folder)
    record = {
        "command": "python -m experiments.one_layer.run",
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "seeds": list(SEEDS),
        "counts": counts,
        "recovery": rows,
        "alpha_grid": {
            "alpha_over_r": ALPHAS,
            "learning_rates": RATES,
            "median_final_loss": grid.tolist(),
        },
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    table = to_markdown(counts, rows)
    (folder / "table.md").write_text(table + "\n")
    print(table)
    print(f"\n{seconds:.1f} s; results, table and plots in {folder}")


if __name__ == "__main__":
    main()
