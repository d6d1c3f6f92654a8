"""Judging a run: better or worse than the frozen base, or diverged."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.finetune.errors import DivergedError
from lora_jax.finetune.formatting import metric_text
from lora_jax.finetune.job import Job


def is_finite(line: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    """Returns whether a validation's metrics are finite; None is NaN read from JSON."""
    values = (line[name] for name in metrics)
    return all(value is not None and math.isfinite(value) for value in values)


def diverged(
    job: Job,
    *,
    step: int,
    skipped: int,
    best: Mapping[str, Any] | None,
    last: Mapping[str, Any] | None,
) -> DivergedError:
    """Returns the error that ends a run whose loss is no longer finite.

    Args:
      job: the job.
      step: the current step.
      skipped: number of steps so far whose loss or gradient was not finite.
      best: the line of the best validation so far, if any was finite.
      last: the line of the last validation.
    """
    train = job.settings.train
    loss = last and last["loss"]
    lines = [
        f"the run has diverged: {skipped} of {step} steps were skipped, their loss or "
        f"gradient not finite, and the validation loss is "
        f"{math.nan if loss is None else loss:.4g}."
    ]
    if skipped == step:
        lines.append(
            "Not even the first step was finite, so the base or its dtype is at fault: "
            f"`lora-jax inspect {job.loaded.path}` counts weights that are not finite; "
            "model.dtype=float32 has the widest range (now "
            f"{job.settings.model.dtype})."
        )
    else:
        lines.append(
            f"Lower train.learning_rate (now {train.learning_rate:g}; most adapters "
            "train at 1e-4 to 1e-3) or raise train.warmup, and start again in another "
            "output.dir, or with --overwrite (in Python: overwrite=True)."
        )
    if best is None:
        lines.append("No validation was finite, so no adapter was kept.")
    else:
        shown = metric_text(job.metric, best[job.metric])
        lines.append(
            f"The last good adapter, of step {best['step']} (validation {job.metric} "
            f"{shown}), and its checkpoint are kept."
        )
    return DivergedError("\n".join(lines))


def warning(
    job: Job,
    *,
    best: Mapping[str, Any],
    last: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
) -> str | None:
    """Returns a warning if training made the model worse than the frozen base.

    Args:
      job: the job.
      best: the line of the best validation.
      last: the line of the last validation.
      baseline: the frozen base's line, if it was measured.

    Returns:
      The warning; None if the run ended better than the base, or equal as displayed.
    """
    if baseline is None:
        return None
    name, base = job.metric, baseline[f"validation_{job.metric}"]

    def is_worse(value: float) -> bool:
        is_shown = metric_text(name, base) != metric_text(name, value)
        return is_shown and job.is_better(base, value)

    def compare(line: Mapping[str, Any]) -> str:
        return (
            f"validation {name} {metric_text(name, line[name])} at step "
            f"{line['step']}, {metric_text(name, base)} for the {baseline['what']}"
        )

    if is_worse(best[name]):
        return (
            f"The adapter is worse than the base without it ({compare(best)}): don't "
            "merge it. Try a lower train.learning_rate."
        )
    if is_worse(last[name]):
        return (
            f"The run ended worse than the base ({compare(last)}); the adapter of step "
            f"{best['step']} is kept. Try a lower train.learning_rate or fewer steps."
        )
    return None
