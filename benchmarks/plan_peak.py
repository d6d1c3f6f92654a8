"""Memory predicted by `lora-jax plan` against measured memory of a training process.

Each case runs two processes. The first is ``lora-jax plan CONFIG --json``: the
predicted peak is its frozen base, trained weights, optimizer and temporaries. The
second builds the same job and state and trains: the measured peak is the increase of
its anonymous resident memory during the steps after the first, plus the bytes of its
persistent arrays. This excludes the memory of Python, JAX and the compiler (about
300 MB), which a plan does not cover.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.loading import write_llama
from benchmarks.memory import anonymous_bytes, peak_watched
from experiments.fetch import minilm

STEPS, SETTLE = 4, 2.0  # measured steps; seconds to wait before them
WORDS = ("the", "film", "is", "a", "lovely", "and", "quiet", "story", "of", "two")


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all cases.

    Args:
      quick: only the encoder.

    Returns:
      One row per case.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = _write_cases(Path(folder), quick)
        return [{"case": name, **_compare(config)} for name, config in cases.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| training step | base + trained + optimizer + temporaries | predicted | "
        "measured peak | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        plan = row["plan"]
        parts = ("base", "trained", "optimizer", "temporaries")
        shown = " + ".join(f"{plan[part] / 1e6:,.0f}" for part in parts)
        lines.append(
            f"| {row['case']} | {shown} MB | {plan['total'] / 1e6:,.0f} MB | "
            f"{row['peak_bytes'] / 1e6:,.0f} MB | "
            f"{plan['total'] / row['peak_bytes']:.2f} |"
        )
    return "\n".join(lines)


def _write_cases(folder: Path, quick: bool) -> dict[str, Path]:
    """Writes models, data and configs; returns the config of each case."""
    import numpy as np

    rng = np.random.default_rng(0)
    long = [" ".join(rng.choice(WORDS, 200)) for _ in range(64)]
    _write_lines(
        folder / "texts.jsonl",
        [{"text": text, "label": i % 2} for i, text in enumerate(long)],
    )
    cases = {
        "MiniLM-L6 (encoder), 32 x 128 tokens, rank 8": {
            "model": {"path": str(minilm())},
            "data": {"train": str(folder / "texts.jsonl"), "max_length": 128},
        }
    }
    if not quick:
        (folder / "llama").mkdir()
        write_llama(folder / "llama", 8)
        ids = rng.integers(5, 1000, (64, 512)).tolist()
        _write_lines(folder / "ids.jsonl", [{"input_ids": row} for row in ids])
        for rows, remat in ((2, "none"), (4, "block")):
            name = f"Llama of 8 layers, d 1024, {rows} x 512 tokens, remat {remat}"
            cases[name] = {
                "model": {
                    "path": str(folder / "llama"),
                    "scan": remat == "block",
                    "remat": remat,
                },
                "data": {"train": str(folder / "ids.jsonl"), "max_length": 512},
                "train": {"batch_size": rows},
            }
    written = {}
    for number, (name, settings) in enumerate(cases.items()):
        settings = {
            "train": {"batch_size": 32},
            "lora": {"rank": 8, "alpha": 16},
            "output": {"dir": str(folder / f"run-{number}")},
            **settings,
        }
        settings["data"] |= {"holdout": 0.1}
        written[name] = folder / f"case-{number}.yaml"
        written[name].write_text(json.dumps(settings))  # JSON is YAML
    return written


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _compare(config: Path) -> dict[str, Any]:
    def run(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    plan = run("lora_jax.cli.main", "plan", str(config), "--json")["step"]["lora"]
    return {"plan": plan, **run("benchmarks.plan_peak", str(config))}


def _train_and_print(config: str) -> None:
    """Trains a few steps while a thread samples the memory."""
    import jax

    from lora_jax.finetune import job
    from lora_jax.finetune.report import tree_bytes
    from lora_jax.finetune.settings import load_settings
    from lora_jax.finetune.tasks import open_job
    from lora_jax.train.state import TrainState
    from lora_jax.train.step import make_train_step

    settings = load_settings(config, [])
    opened = open_job(settings, splits=["train"])
    batches = opened.batches()
    total = job.total_steps(settings.train, batches.steps_per_epoch)
    tx = job.optimizer(settings.train, total)
    state = TrainState.create(opened.variables, tx, jax.random.key(0))
    loss = opened.loss(opened.adapted, is_training=True)
    step = make_train_step(loss, tx, settings.train.accumulate)
    batch = batches.batch_at(0)
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    time.sleep(SETTLE)  # let the allocator return freed memory to the system
    before, held = anonymous_bytes(), tree_bytes(state)
    with peak_watched() as peak:
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
    found = {
        "peak_bytes": peak[0] - before + held,
        "held_bytes": held,
        "process_bytes": before - held,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains one case; prints its peak.")
    parser.add_argument("config")
    _train_and_print(parser.parse_args().config)
