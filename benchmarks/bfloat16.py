"""Loss of a real job in bfloat16 and in float32, step by step.

MiniLM learns to tell good film reviews from bad ones, as in `experiments.sentiment`.
Base and activations are in one dtype or the other; adapters, moments and losses are
float32 in both, and batches, order and initial adapters are the same.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import fine_tune

STEPS, BATCH, WINDOW = 200, 8, 20
DTYPES = ("float32", "bfloat16")
READ = ("model.path", "data.train")  # a few of the training sentences validate


def main(quick: bool) -> list[dict[str, Any]]:
    """Trains twice.

    Args:
      quick: fewer steps.

    Returns:
      One row per dtype: the loss of each step.
    """
    from experiments.sentiment.train import arguments

    _, config, *settings = arguments()
    settings = [each for each in settings if each.split("=")[0] in READ]
    steps = 2 * WINDOW if quick else STEPS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            run = fine_tune(
                config,
                [
                    *settings,
                    f"model.dtype={dtype}",
                    f"model.param_dtype={dtype}",
                    f"train.max_steps={steps}",
                    f"train.batch_size={BATCH}",
                    "data.holdout=0.01",
                    "data.max_length=32",
                    "train.baseline=false",
                    "train.log_every=1",
                    f"train.eval_every={steps}",
                    f"output.dir={Path(folder) / dtype}",
                ],
            )
            losses = [line["loss"] for line in run.metrics if "loss" in line]
            losses = losses[:steps]  # the last is of the validation
            rows.append({"dtype": dtype, "batch": BATCH, "losses": losses})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    wanted, got = (np.array(row["losses"]) for row in rows)
    apart = np.abs(got - wanted)
    lines = [
        f"Mean loss of {WINDOW} steps, batches of {rows[0]['batch']}:\n",
        "| steps | float32 | bfloat16 | difference | largest of a step |",
        "|---|---|---|---|---|",
    ]
    for start in range(0, len(wanted), WINDOW):
        part = slice(start, start + WINDOW)
        means = wanted[part].mean(), got[part].mean()
        lines.append(
            f"| {start + 1}–{start + len(wanted[part])} | {means[0]:.4f} | "
            f"{means[1]:.4f} | {means[1] - means[0]:+.4f} | {apart[part].max():.4f} |"
        )
    means = wanted.mean(), got.mean()
    lines.append(
        f"| all | {means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | "
        f"{apart.max():.4f} |"
    )
    return "\n".join(lines)
