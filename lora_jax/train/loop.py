"""The training loop, with callbacks for logging, validation and checkpoints.

Steps are dispatched asynchronously; the host waits for the device once every
``log_every`` steps, and before validation and saving. The step number is the position
in the data, so resuming needs only the checkpointed state.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import jax

from lora_jax.train.state import TrainState

Sums = Mapping[str, Any]
Metrics = Mapping[str, jax.Array]
R = TypeVar("R")
# Yields the number of a step and the state to take it from; is sent what it gave.
Steps = Generator[tuple[int, TrainState], tuple[TrainState, Metrics], R]


class Progress(NamedTuple):
    """Means over the steps since the last report.

    Attributes:
      step: number of completed steps.
      metrics: ``loss``, ``grad_norm`` and the step's other metrics.
      skipped: number of these steps skipped as not finite.
      seconds: wall time of these steps, excluding validation and saving.
      examples: total weight of their examples.
    """

    step: int
    metrics: dict[str, float]
    skipped: int
    seconds: float
    examples: float


class Fitted(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the state after the last step.
      is_stopped: whether ``should_stop`` ended the loop early.
    """

    state: TrainState
    is_stopped: bool


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batch_at: Callable[[int], Any],
    **options: Any,
) -> Fitted:
    """Trains from ``state.step`` up to ``total_steps``.

    Args:
      state: the initial state; donated.
      step: from `make_train_step`.
      batch_at: returns the batch of a step, a pure function of its number.
      **options: ``total_steps`` and the rest, see `fitting`.

    Returns:
      The trained state, and whether the loop was stopped early.

    Raises:
      ValueError: if a period is below 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from lora_jax.train.step import make_train_step
      >>> loss = lambda v, x, rngs: (jnp.sum((v["lora"]["a"] - x) ** 2), len(x), {})
      >>> tx = optax.sgd(0.5)
      >>> variables = {"lora": {"a": jnp.ones(())}}
      >>> state = TrainState.create(variables, tx, jax.random.key(0))
      >>> fitted = fit(state, make_train_step(loss, tx), jnp.ones, total_steps=0)
      >>> fitted.is_stopped
      False
    """
    return take_steps(fitting(state, **options), step, batch_at, options["total_steps"])


def take_steps(
    steps: Steps[R],
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batch_at: Callable[[int], Any],
    total_steps: int,
) -> R:
    """Takes the steps that a loop asks for, until it ends.

    While the device works on a step, the host makes the batch of the next one and
    sends it there.

    Args:
      steps: the loop: `fitting`, or what yields from it.
      step: from `make_train_step`.
      batch_at: returns the batch of a step.
      total_steps: the number of the last step; no later batch is made.

    Returns:
      What the loop returns.
    """
    try:
        number, state = next(steps)
        batch = _made(batch_at, number)
        while True:
            try:
                taken = step(state, batch.result())
            except BaseException as error:
                steps.throw(error)  # ends what the loop has open
                raise
            following = number + 1
            if following < total_steps:
                batch = _made(batch_at, following)
            number, state = steps.send(taken)
    except StopIteration as end:
        return end.value


def _made(batch_at: Callable[[int], Any], number: int) -> Future[Any]:
    """Makes a batch; an error is raised where it is needed, after what is due before.

    Processes that share a mesh place batches themselves (`shard_batch`).
    """
    made = Future()
    try:
        batch = batch_at(number)
        made.set_result(batch if jax.process_count() > 1 else jax.device_put(batch))
    except Exception as error:
        made.set_exception(error)
    return made


def fitting(
    state: TrainState,
    *,
    total_steps: int,
    log_every: int = 10,
    on_step: Callable[[int], None] = lambda step: None,
    on_log: Callable[[Progress], None] = lambda progress: None,
    every: Sequence[tuple[int, Callable[[TrainState], None]]] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Steps[Fitted]:
    """The loop of `fit` without its steps, which whoever drives it takes.

    So one loop serves a run of its own (`take_steps`) and a run that shares a compiled
    step with others.

    Args:
      state: the initial state.
      total_steps: the last step.
      log_every: number of steps between reports, when the host waits for the device.
      on_step: called with the number of each completed step.
      on_log: called every ``log_every`` steps and after the last.
      every: callbacks with their periods: ``[(100, validate)]`` calls
        ``validate(state)`` after steps 100, 200, ... and after the last. Callbacks must
        not keep the state: the next step donates it.
      should_stop: polled after each dispatch; True ends the loop after the steps in
        flight and the callbacks due after them.

    Yields:
      The number of a step, and the state to take it from; expects the new state and
      the metrics.

    Returns:
      The trained state, and whether the loop was stopped early.

    Raises:
      ValueError: if a period is below 1.
    """
    if wrong := [n for n in (log_every, *(n for n, _ in every)) if n < 1]:
        raise ValueError(f"periods must be at least 1 step; got {wrong}.")
    done, pending = int(state.step), []
    start = time.perf_counter()
    while done < total_steps:
        state, metrics = yield done, state
        pending.append(metrics)
        done += 1
        is_stopped = should_stop() and done < total_steps
        is_last = done == total_steps
        due = [call for n, call in every if done % n == 0 or is_last]
        if not (is_last or is_stopped or due or done % log_every == 0):
            continue
        for number, values in enumerate(pending, done - len(pending) + 1):
            jax.block_until_ready(values)
            on_step(number)
        on_log(_summarise(done, pending, time.perf_counter() - start))
        pending = []
        for call in due:
            call(state)
        if is_stopped:
            return Fitted(state, True)
        start = time.perf_counter()
    return Fitted(state, False)


def evaluate(
    eval_step: Callable[[Any, Any], Sums], variables: Any, batches: Any
) -> dict[str, float]:
    """Averages an evaluation over batches, weighted by their examples.

    Args:
      eval_step: from `make_eval_step`.
      variables: all collections.
      batches: an iterable of batches.

    Returns:
      The mean of ``loss`` and of each other metric, and their total ``weight``.

    Raises:
      ValueError: if the total weight is 0.
    """
    total: dict[str, float] = {}
    for sums in jax.device_get([eval_step(variables, batch) for batch in batches]):
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
    weight = total.pop("weight", 0.0)
    if not weight:
        raise ValueError("an evaluation needs a total weight above 0; got weight 0.")
    return {**{name: value / weight for name, value in total.items()}, "weight": weight}


def _summarise(step: int, pending: list[Any], seconds: float) -> Progress:
    rows = jax.device_get(pending)
    kept = [row for row in rows if not int(row["is_skipped"])]
    weight = sum(float(row["weight"]) for row in kept)
    names = [name for name in rows[0] if name not in ("weight", "is_skipped")]
    means = {
        name: sum(float(row[name]) * float(row["weight"]) for row in kept) / weight
        if weight
        else float("nan")
        for name in names
    }
    examples = sum(float(row["weight"]) for row in rows)
    return Progress(step, means, len(rows) - len(kept), seconds, examples)
