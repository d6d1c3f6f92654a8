"""Table-to-text generation with a language model: E2E, as in the LoRA paper.

Trains the adapters missing from ``results/runs.jsonl`` (10 to 20 minutes each on 2
cores), scores them and the base on held-out tables, and makes the table and the plot
from that file.

    python -m experiments.e2e.run            # everything that is missing
    python -m experiments.e2e.run --report   # table and plot only
"""

import argparse
import gzip
import json
import platform
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sacrebleu

from experiments.fetch import smollm2
from lora_jax import (
    LoadedModel,
    LoRAConfig,
    TextBatches,
    TrainState,
    adapt,
    count,
    evaluate,
    fingerprint,
    fit,
    generate,
    load_adapter,
    load_model,
    lora_optimizer,
    make_eval_step,
    make_lm_loss,
    make_train_step,
    save_adapter,
    unscan,
)

SEED = 0
BATCH, LEARNING_RATE, EPOCHS = 16, 1e-3, 1
SENTENCES = 4  # maximum per training table: a budget of 25 minutes on 2 slow cores
VALIDATION_TABLES, TEST_TABLES, SHOTS, MAX_NEW = 40, 200, 5, 64
PLAN = {
    "base": {},
    "base, 5 examples in the prompt": {"shots": SHOTS},
    "LoRA, all linears, r 8": {"rank": 8, "targets": "all-linear"},
    "LoRA, query and value, r 42": {"rank": 42, "targets": ["query", "value"]},
}
HERE = Path(__file__).parent
RESULTS = HERE / "results"
ADAPTERS = Path("runs/e2e")

Table = tuple[str, list[str]]  # slots, and human-written sentences for them


def read_tables(split: str) -> list[Table]:
    """Reads a split: every table once, with all its sentences, in file order."""
    tables: dict[str, list[str]] = {}
    with gzip.open(HERE / "data" / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            slots, sentence = line.strip().split("||")
            tables.setdefault(slots.strip(), []).append(sentence.strip())
    return list(tables.items())


class Tables(NamedTuple):
    """The disjoint splits of the tables."""

    train: list[Table]
    validation: list[Table]
    test: list[Table]
    shots: str


def split_tables() -> Tables:
    """Splits the tables, and writes the few-shot examples for the base."""
    tables, rng = read_tables("valid"), random.Random(SEED)
    rng.shuffle(tables)
    validation, train = tables[:VALIDATION_TABLES], tables[VALIDATION_TABLES:]
    test = rng.sample(read_tables("test"), TEST_TABLES)
    shots = "".join(
        f"{slots}\n{rng.choice(sentences)}\n\n"
        for slots, sentences in rng.sample(train, SHOTS)
    )
    seen = [
        (slots, rng.sample(sentences, min(SENTENCES, len(sentences))))
        for slots, sentences in train
    ]
    return Tables(seen, validation, test, shots)


class Task:
    """The model and the tables, loaded once."""

    def __init__(self):
        self.loaded: LoadedModel = load_model(smollm2(), scan_layers=True, remat="lora")
        self.tables = split_tables()

    def example(self, prompt: str, sentence: str, *, ends: bool) -> dict[str, Any]:
        """Tokenises both; the loss covers the sentence, and EOS if ``ends``."""
        tokenizer = self.loaded.tokenizer
        text = tokenizer.encode_text(prompt + sentence)
        mask = [int(end > len(prompt)) for _, end in text.spans]
        eos = [tokenizer.special.eos_id] if ends else []
        return {"input_ids": text.ids + eos, "loss_mask": mask + [1] * len(eos)}


def nll(task: Task, module, variables, tables: list[Table], before: str = "") -> float:
    """Returns the loss in nats per token on one sentence per table, without EOS."""
    rng = random.Random(SEED)
    examples = [
        task.example(f"{before}{slots}\n", rng.choice(sentences), ends=False)
        for slots, sentences in tables
    ]
    step = make_eval_step(make_lm_loss(module, is_tied=True))
    batches = TextBatches(examples, BATCH, shuffle=False)
    return evaluate(step, variables, batches.epoch(0))["loss"]


def write_sentences(
    task: Task, module, variables, tables: list[Table], before: str = ""
) -> list[str]:
    """Generates a sentence for each table greedily, up to the end of the line."""
    tokenizer = task.loaded.tokenizer
    model = unscan(task.loaded._replace(module=module, variables=variables))
    prompts = [tokenizer.encode_text(f"{before}{slots}\n").ids for slots, _ in tables]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sentences = [""] * len(prompts)
    for start in range(0, len(order), 2 * BATCH):
        rows = order[start : start + 2 * BATCH]

        def is_over(row: int, ids: list[int]) -> bool:
            del row
            return "\n" in tokenizer.decode(ids[-1:])

        texts = generate(
            model.module,
            model.variables,
            [prompts[i] for i in rows],
            max_new_tokens=MAX_NEW,
            stop_ids=tokenizer.special.stop_ids,
            on_token=is_over,
        )
        for i, ids in zip(rows, texts, strict=True):
            sentences[i] = tokenizer.decode(ids).strip()
    return sentences


def bleu(sentences: list[str], tables: list[Table]) -> float:
    """Corpus BLEU against all sentences of each table (the data are tokenised)."""
    most = max(len(references) for _, references in tables)
    columns = [
        [refs[i] if i < len(refs) else None for _, refs in tables] for i in range(most)
    ]
    return sacrebleu.corpus_bleu(sentences, columns, tokenize="none", force=True).score


def train(task: Task, name: str, spec: dict[str, Any]):
    """Trains one adapter for one epoch; returns module, variables and its record.

    An existing adapter is loaded from `ADAPTERS` instead.
    """
    place = ADAPTERS / name.replace(",", "").replace(" ", "-")
    lora_key, step_key = jax.random.split(jax.random.key(SEED))
    lora = LoRAConfig(
        rank=spec["rank"], alpha=2 * spec["rank"], targets=spec["targets"]
    )
    module = adapt(task.loaded.module, lora)
    variables = module.attach(task.loaded.params, lora_key)
    base = fingerprint(variables["frozen"])
    examples = [
        task.example(f"{slots}\n", sentence, ends=True)
        for slots, sentences in task.tables.train
        for sentence in sentences
    ]
    if place.is_dir():
        before = load_adapter(place, expected=variables, fingerprint=base)
        record = before.extra["training"]
        if record["examples"] != len(examples):
            raise SystemExit(f"{place} is from a different plan: move it away.")
        return module, {**variables, **before.variables}, record
    batches = TextBatches(examples, BATCH, seed=SEED)
    steps = EPOCHS * batches.steps_per_epoch
    tx = lora_optimizer(
        LEARNING_RATE, total_steps=steps, warmup_steps=round(0.1 * steps)
    )
    loss_fn = make_lm_loss(module, is_tied=True)
    state = TrainState.create(variables, tx, step_key)
    trainable, curve = count(state.trainable), []
    held_out = [
        task.example(f"{slots}\n", sentences[0], ends=True)
        for slots, sentences in task.tables.validation
    ]
    eval_step = make_eval_step(loss_fn)
    eval_batches = TextBatches(held_out, BATCH, batches.buckets, shuffle=False)

    def on_log(progress):
        print(
            f"  {name}: step {progress.step}/{steps}, loss "
            f"{progress.metrics['loss']:.3f}, {progress.seconds:.0f} s",
            flush=True,
        )

    def validate(state):
        loss = evaluate(eval_step, state.variables, eval_batches.epoch(0))["loss"]
        curve.append([int(state.step), loss])
        print(f"  {name}: step {curve[-1][0]}, validation {loss:.4f}", flush=True)

    start = time.perf_counter()
    state = fit(
        state,
        make_train_step(loss_fn, tx),
        batches.batch_at,
        total_steps=steps,
        on_log=on_log,
        every=[(50, validate)],
    ).state
    seconds = time.perf_counter() - start
    record = {
        "trainable": trainable,
        "steps": steps,
        "examples": len(examples),
        "buckets": batches.buckets,
        "token_fraction": round(batches.token_fraction, 3),
        "training_seconds": round(seconds),
        "curve": curve,
    }
    extra = {"model": str(smollm2()), "training": record}
    save_adapter(place, state.trainable, lora, base, extra=extra)
    return module, state.variables, record


def run_plan() -> None:
    """Trains and scores the runs missing from results/runs.jsonl."""
    missing = {k: v for k, v in PLAN.items() if k not in read_runs()}
    if not missing:
        return
    task = Task()
    for name, spec in missing.items():
        print(f"{name} ...", flush=True)
        module, variables = task.loaded.module, task.loaded.variables
        record: dict[str, Any] = {"name": name, **spec}
        if "rank" in spec:
            module, variables, trained = train(task, name, spec)
            record |= trained
        before = task.tables.shots if spec.get("shots") else ""
        start = time.perf_counter()
        record["nll"] = nll(task, module, variables, task.tables.test, before)
        sentences = write_sentences(task, module, variables, task.tables.test, before)
        record["bleu"] = bleu(sentences, task.tables.test)
        record["scoring_seconds"] = round(time.perf_counter() - start)
        record["outputs"] = sentences[:8]
        record["date"] = time.strftime("%Y-%m-%d")
        record["versions"] = {
            "jax": jax.__version__,
            "python": platform.python_version(),
        }
        with (RESULTS / "runs.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"  nll {record['nll']:.3f}, BLEU {record['bleu']:.1f}", flush=True)


def read_runs() -> dict[str, dict[str, Any]]:
    """Returns every recorded run by name, in the order of the plan."""
    path = RESULTS / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = {run["name"]: run for run in map(json.loads, lines)}
    return {name: runs[name] for name in PLAN if name in runs}


def report() -> None:
    """Writes the table, the examples and the plot from the runs."""
    runs = read_runs()
    lines = [
        "| | trained | training | nats per token | perplexity | BLEU |",
        "|---|---|---|---|---|---|",
    ]
    for name in PLAN:
        if name in runs:
            run = runs[name]
            trained = f"{run['trainable']:,}" if "trainable" in run else "–"
            minutes = (
                f"{run['training_seconds'] / 60:.1f} min" if "trainable" in run else "–"
            )
            lines.append(
                f"| {name} | {trained} | {minutes} | {run['nll']:.3f} | "
                f"{np.exp(run['nll']):.2f} | {run['bleu']:.1f} |"
            )
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    _write_examples(runs)
    _plot(runs)


def _write_examples(runs: dict[str, dict[str, Any]]) -> None:
    tables, lines = split_tables().test, []
    for i in range(4):
        lines.append(f"**{tables[i][0]}**\n")
        lines += [f"- {n}: {run['outputs'][i]}" for n, run in runs.items()]
        lines.append(f"- a person: {tables[i][1][0]}\n")
    (RESULTS / "examples.md").write_text("\n".join(lines) + "\n")


def _plot(runs: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        if "curve" in run:
            axes.plot(*zip(*run["curve"], strict=True), marker="o", label=name)
    axes.set(xlabel="step", ylabel="validation loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "curves.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="table and plot only")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not arguments.report:
        run_plan()
    report()
