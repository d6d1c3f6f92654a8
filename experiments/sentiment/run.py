"""Linear probe, LoRA and full fine-tuning of a sentence encoder, tuned alike.

Runs every configuration missing from ``results/runs.jsonl`` (a few minutes each on 2
cores), then makes the table and the plot from that file. Each method tries the same
number of settings with seed 0; the one with the lowest validation loss is compared on
the test sentences with three seeds.

    python -m experiments.sentiment.run            # everything that is missing
    python -m experiments.sentiment.run --report   # table and plot only
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
import yaml

from experiments.fetch import minilm
from experiments.sentiment.plot import plot
from experiments.vader import load_vader
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
    lora_optimizer,
    make_eval_step,
    make_train_step,
    probe_accuracy,
    softmax_cross_entropy,
)

HEAD = "classifier"
EPOCHS, MAX_LENGTH = 1, 128
SEEDS = (0, 1, 2)
SETTING = (
    "rank",
    "targets",
    "learning_rate",
    "batch_size",
    "scaling",  # alpha / rank
    "dropout_rate",
)
LINEARS, MLP = "all-linear", ["up", "down"]
EMBEDDED = ["query", "key", "value", "output", *MLP, "word"]  # and word embeddings
TRIES = {  # values of SETTING
    "lora": (
        (8, LINEARS, 2e-3, 32, 2, 0.0),
        (8, LINEARS, 1e-3, 32, 4, 0.0),
        (8, LINEARS, 1e-3, 16, 4, 0.0),
        (8, LINEARS, 2e-3, 16, 2, 0.0),
        (8, EMBEDDED, 1e-3, 16, 4, 0.0),
        (8, LINEARS, 1e-3, 8, 4, 0.0),
        (16, LINEARS, 1e-3, 16, 4, 0.0),
    ),
    "full": (
        (None, None, 2e-4, 32, None, 0.0),
        (None, None, 1e-4, 32, None, 0.0),
        (None, None, 1e-4, 16, None, 0.0),
        (None, None, 2e-4, 16, None, 0.0),
        (None, None, 3e-4, 32, None, 0.0),
        (None, None, 2e-4, 64, None, 0.0),
        (None, None, 2e-4, 32, None, 0.1),
        (None, None, 3e-4, 64, None, 0.0),  # matches LoRA's superseded try
    ),
}
PROBE, LORA, FULL = ({"method": name} for name in ("probe", "lora", "full"))
SWEEP = (  # differences from LoRA's selected setting
    {"rank": 1},
    {"rank": 8},
    {"rank": 16},
    {"targets": ["query", "value"]},
    {"targets": MLP},
    {"targets": LINEARS},
    {"targets": EMBEDDED},
)
HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Task:
    """The model and the tokenised sentences, loaded once."""

    def __init__(self):
        self.loaded = load_model(minilm(), num_labels=2)
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
    """Fits a linear head on the frozen base's sentence vectors."""
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
        module = task.loaded.module.clone(dropout_rate=spec["dropout_rate"])
        variables = {"params": params}
    else:
        rank = spec["rank"]
        config = LoRAConfig(
            rank=rank,
            alpha=spec["scaling"] * rank,
            targets=spec["targets"],
            dropout_rate=spec["dropout_rate"],
            train=[HEAD],
        )
        module = adapt(task.loaded.module, config)
        variables = module.attach(params, lora_key)

    def loss_fn(variables, batch, rngs):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = module.apply(variables, ids, mask, deterministic=not rngs, rngs=rngs)
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
    """Runs what is missing: tuning first, then the seeds at the selected settings."""

    def done(spec):
        if of(read_runs(), spec):
            return
        print(f"{json.dumps(spec)} ...", flush=True)
        run = run_probe if spec["method"] == "probe" else run_training
        record = {**run(task, spec), "date": time.strftime("%Y-%m-%d")}
        with (RESULTS / "runs.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"  validation {record['validation']:.4f}", flush=True)

    done(PROBE)
    for base in (LORA, FULL):
        for setting in settings_of(base):
            done({**base, **setting, "seed": SEEDS[0]})
    for spec in compared(read_runs()):
        for seed in SEEDS:
            done({**spec, "seed": seed})


def read_runs() -> list[dict[str, Any]]:
    """Returns the recorded runs, without those superseded by changes in the library.

    Early runs have no recorded dropout rate: it was 0.
    """
    path = RESULTS / "runs.jsonl"
    lines = path.open() if path.exists() else ()
    runs = [{"dropout_rate": 0.0, **json.loads(line)} for line in lines]
    return [run for run in runs if "superseded" not in run]


def settings_of(base: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings that a method tries."""
    tries = TRIES[base["method"]]
    return [dict(zip(SETTING, values, strict=True)) for values in tries]


def chosen_setting(runs: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Returns the setting with the lowest validation loss at the first seed."""

    def loss(setting):
        (run,) = of(runs, {**base, **setting, "seed": SEEDS[0]})
        return run["validation_loss"]

    return min(settings_of(base), key=loss)


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the specs compared over seeds: selected settings, and LoRA's sweep."""
    main = {**LORA, **chosen_setting(runs, LORA)}
    sweep = [{**main, **change} for change in SWEEP]
    full = {**FULL, **chosen_setting(runs, FULL)}
    return [main, full, *(spec for spec in sweep if spec != main)]


def of(runs: list[dict[str, Any]], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the runs of a spec, ordered by seed."""
    found = [r for r in runs if all(r.get(k) == v for k, v in spec.items())]
    return sorted(found, key=lambda run: run.get("seed", 0))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per method: test accuracy over seeds at its selected setting."""
    rows = []
    for spec in (PROBE, *compared(runs)):
        if found := of(runs, spec):
            row = {**spec, "trainable": found[0]["trainable"]}
            row["test"] = [100 * run["test"] for run in found]
            rows.append({"name": label(spec), **row})
    return rows


def label(spec: dict[str, Any]) -> str:
    """Returns the name of a method in the tables and the plot."""
    if spec["method"] == "probe":
        return "frozen base, linear head"
    if spec["method"] == "full":
        return "full fine-tuning"
    targets = spec["targets"]
    names = {LINEARS: "all linears", tuple(EMBEDDED): "all linears and word embedding"}
    key = targets if isinstance(targets, str) else tuple(targets)
    return f"LoRA r {spec['rank']}, {names.get(key) or ', '.join(targets)}"


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
        setting = "–"
        if "batch_size" in row:
            setting = f"{row['learning_rate']:g}, {row['batch_size']}"
        share = 100 * row["trainable"] / total
        lines.append(
            f"| {row['name']} | {setting} | {row['trainable']:,} ({share:.2f} %) | "
            f"{', '.join(f'{x:.2f}' for x in test)} | "
            f"{statistics.mean(test):.2f}{spread} |"
        )
    return "\n".join(lines)


def tuning_table(runs: list[dict[str, Any]]) -> str:
    """Returns the README's table of the tuning runs, with selected settings bold."""
    lines = [
        "| method | learning rate | batch | alpha / r | dropout | validation loss | "
        "validation accuracy, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for base in (LORA, FULL):
        best = chosen_setting(runs, base)
        for setting in settings_of(base):
            spec = {**base, **setting}
            (run,) = of(runs, {**spec, "seed": SEEDS[0]})
            loss = f"{run['validation_loss']:.3f}"
            lines.append(
                f"| {label(spec)} | {run['learning_rate']:g} | {run['batch_size']} | "
                f"{run['scaling'] or '–'} | {run['dropout_rate']:g} | "
                f"{f'**{loss}**' if setting == best else loss} | "
                f"{100 * run['validation']:.1f} |"
            )
    return "\n".join(lines)


def report() -> None:
    """Writes tables, plot and summary from the runs."""
    runs = read_runs()
    missing = [
        spec
        for base in (LORA, FULL)
        for setting in settings_of(base)
        if not of(runs, spec := {**base, **setting, "seed": SEEDS[0]})
    ]
    if missing:
        raise SystemExit(
            f"{len(missing)} tuning runs are missing, so no setting is selected; run "
            "without --report:\n" + "\n".join(map(json.dumps, missing))
        )
    rows = summarise(runs)
    total = next(r["trainable"] for r in runs if r["method"] == "full")
    table = to_markdown(rows, total)
    record = {
        "command": "python -m experiments.sentiment.run",
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "seeds": SEEDS,
        "rows": rows,
    }
    (RESULTS / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table + "\n")
    headline = to_markdown(rows[:3], total)  # probe, LoRA, full fine-tuning
    (RESULTS / "headline.md").write_text(headline + "\n")
    (RESULTS / "tuning.md").write_text(tuning_table(runs) + "\n")
    plot(rows, RESULTS / "accuracy.png")
    print(table)
    check_main_config(rows[1])


def check_main_config(chosen: dict[str, Any]) -> None:
    """Raises unless config.yaml has LoRA's selected setting."""
    settings = yaml.safe_load((HERE / "config.yaml").read_text())
    lora, train = settings["lora"], settings["train"]
    ours = {
        "rank": lora["rank"],
        "targets": lora["targets"],
        "learning_rate": train["learning_rate"],
        "batch_size": train["batch_size"],
        "scaling": lora["alpha"] / lora["rank"],
        "dropout_rate": lora.get("dropout_rate", 0.0),
    }
    wanted = {name: chosen[name] for name in SETTING}
    if ours != wanted:
        raise SystemExit(f"config.yaml must have {wanted}; it has {ours}.")


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
