"""What became of a run: better than the frozen base, worse, or no number at all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.finetune.errors import DivergedError
from lora_jax.finetune.formatting import metric_text
from lora_jax.finetune.job import Job


def is_finite(line: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    """Says whether a validation's metrics are numbers; None is NaN, read from JSON."""
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
    """Returns the error that ends a run whose loss is no longer a number.

    Args:
      job: what was trained.
      step: at which that was seen.
      skipped: steps so far whose loss or gradient was not finite.
      best: the line of the best validation so far, if one was finite.
      last: the line of the last validation.

    Returns:
      The error, to be raised.
    """
    train = job.settings.train
    loss = last and last["loss"]
    said = [
        f"the run has diverged: {skipped} of {step} steps were skipped, their loss or "
        f"gradient not finite, and the validation loss is "
        f"{math.nan if loss is None else loss:.4g}."
    ]
    if skipped == step:
        said.append(
            "Not even the first step could be taken, so the base or its dtype is at "
            f"fault: `lora-jax inspect {job.loaded.path}` counts weights that are not "
            f"finite; model.dtype=float32 has the widest range (now "
            f"{job.settings.model.dtype})."
        )
    else:
        said.append(
            f"Lower train.learning_rate (now {train.learning_rate:g}; most adapters "
            "train at 1e-4 to 1e-3) or raise train.warmup, and start anew in another "
            "output.dir, or with --overwrite (in Python: overwrite=True)."
        )
    if best is None:
        said.append("No validation was finite, so no adapter was kept.")
    else:
        shown = metric_text(job.metric, best[job.metric])
        said.append(
            f"The last good adapter is kept, that of step {best['step']} (validation "
            f"{job.metric} {shown}), and its checkpoint too."
        )
    return DivergedError("\n".join(said))


def warning(
    job: Job,
    *,
    best: Mapping[str, Any],
    last: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
) -> str | None:
    """Says so where training made the model worse than the frozen base.

    Args:
      job: what was trained.
      best: the line of the validation that chose the adapter.
      last: the line of the last validation.
      baseline: the frozen base's line, if it was measured.

    Returns:
      A sentence or two; None if the run ended better than the base, or as shown equal.
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
            f"{line['step']}, {metric_text(name, base)} of the {baseline['what']}"
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
