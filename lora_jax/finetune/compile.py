"""Compiling a run's step from shapes, rejecting it before it fills the memory."""

from typing import Any, NamedTuple

import jax

from lora_jax.finetune import job as jobs
from lora_jax.finetune.mixed_step import mixed_shapes
from lora_jax.finetune.pricing import JobSteps
from lora_jax.finetune.reporter import Reporter
from lora_jax.plan.step import StepPlan, batch_shapes, price_step
from lora_jax.train.buckets import Schedule
from lora_jax.train.mixed import mixed_state
from lora_jax.train.state import TrainState
from lora_jax.train.step import TrainStep


class Compiled(NamedTuple):
    """A run's compiled step.

    Attributes:
      step: the step, compiled for every shape of the run.
      state: the initial state.
      plan: the plan of the longest shape.
    """

    step: TrainStep
    state: TrainState
    plan: StepPlan


def compile_step(job: jobs.Job, batches: Schedule, out: Reporter) -> Compiled:
    """Compiles the step for every shape, the longest first.

    Args:
      job: the job; a decoder's ``remat`` is set to the policy that fits.
      batches: batches of its training split.
      out: where to show progress.

    Raises:
      UserError: if the step doesn't fit the device; suggests what does.
    """
    steps, key = JobSteps(job, batches), jax.random.key(job.settings.train.seed)
    if job.adapters:
        state = mixed_shapes(job, steps.hypers)
    else:
        state = TrainState.create(job.variables, steps.optimizer, key)
    longest, *others = _shapes(job, batches, steps.total)
    made: list[TrainStep] = []

    def price(rows: int, remat: str | None) -> StepPlan:
        del rows  # given by the shape
        if remat is not None:
            job.set_remat(remat)
        made.append(steps.make(job.adapted))
        return price_step(made[-1], state, longest, limit=steps.limit, remat=remat)

    with out.progress("compile", 1 + len(others)) as tick:
        plan = steps.choose(price)
        tick(1, f"{plan.tokens} tokens")
        for number, shape in enumerate(others, start=2):
            tick(number, f"{price_step(made[-1], state, shape).tokens} tokens")
    if job.adapters:
        state = mixed_state(job.variables, steps.hypers, key)
    return Compiled(made[-1], state, plan)


def _shapes(job: jobs.Job, batches: Schedule, total: int) -> list[dict[str, Any]]:
    """Returns the batch shapes of a run, longest first."""
    found: dict[int, int] = {}
    for number in range(min(total, batches.steps_per_epoch)):
        found.setdefault(batches.length_at(number), number)
        if len(found) == len(batches.buckets):
            break
    rows, mesh = batches.batch_size, job.devices.mesh
    return [
        batch_shapes(batches.shapes_at(found[length]), rows, mesh)
        for length in sorted(found, reverse=True)
    ]
