"""Full fine-tuning for short runs: every weight, or every weight but the embeddings.

The learning rate is an input of the compiled step, so runs that differ only in it, or
in the seed, share one compilation.
"""

from pathlib import Path
from typing import Any

import jax
import optax

from experiments.short import HEAD, Params, Task
from lora_jax import (
    TrainState,
    classification_loss,
    fit,
    join,
    lora_optimizer,
    make_train_step,
)

EMBEDDINGS = "embeddings"


class FullTraining:
    """Trains the base of a task, one epoch, like its adapters are trained.

    Schedule, clipping, batches and the new head are those of `lora_jax.sweep` with
    `Task.config`.

    Args:
      task: the task.
      file: the training sentences.
      batch_size: sentences per step.
      embeddings: whether to train the embeddings too.
    """

    def __init__(
        self, task: Task, file: Path, *, batch_size: int = 16, embeddings: bool = False
    ) -> None:
        self.task, self.file, self.batch_size = task, file, batch_size
        self.embeddings = embeddings
        self.total = task.batches(file, batch_size).steps_per_epoch
        loss = classification_loss(task.loaded.module)

        def loss_fn(variables: Any, batch: Any, rngs: Any) -> Any:
            params = join(variables.get("frozen", {}), variables["params"])
            return loss({"params": params}, batch, rngs)

        self.step = make_train_step(loss_fn, self._optimizer(1.0))

    def _optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        """AdamW is linear in the rate without decay, so it may scale the updates."""

        def make(scale: Any) -> optax.GradientTransformation:
            warmup = round(0.1 * self.total)
            unit = lora_optimizer(1.0, total_steps=self.total, warmup_steps=warmup)
            return optax.chain(unit, optax.scale(scale))

        return optax.inject_hyperparams(make)(scale=learning_rate)

    def run(self, learning_rate: float, seed: int) -> Params:
        """Trains.

        Args:
          learning_rate: peak of the schedule.
          seed: of the head and of the order of the sentences.

        Returns:
          The trained parameters.
        """
        head_key, _ = jax.random.split(jax.random.key(seed))
        base = self.task.loaded.params
        kernel = 0.02 * jax.random.normal(head_key, base[HEAD]["kernel"].shape)
        head = {**base[HEAD], "kernel": kernel}
        encoder = dict(base["encoder"])
        frozen = {}
        if not self.embeddings:
            frozen = {"encoder": {EMBEDDINGS: encoder.pop(EMBEDDINGS)}}
        variables = {"frozen": frozen, "params": {"encoder": encoder, HEAD: head}}
        tx = self._optimizer(learning_rate)
        state = TrainState.create(variables, tx, jax.random.key(seed))
        batches = self.task.batches(self.file, self.batch_size, seed)
        done = fit(state, self.step, batches.batch_at, total_steps=self.total).state
        return join(done.frozen.get("frozen", {}), done.trainable["params"])
