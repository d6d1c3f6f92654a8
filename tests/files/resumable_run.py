"""A small training run that may be killed at any moment; run by test_checkpoint.

Usage: ``python resumable_run.py DIRECTORY TOTAL_STEPS KILL_AT [mid-save]``.
"""

import hashlib
import os
import pathlib
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.files.checkpoint import Checkpoints
from lora_jax.train.data import Batches
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_train_step
from lora_jax.tree.fingerprint import fingerprint

VOCABULARY, WIDTH = 50, 16


def loss_fn(variables, batch, rngs):
    embedding = variables["frozen"]["embedding"]
    x = embedding[batch["input_ids"]] * batch["attention_mask"][..., None]
    x = x.sum(1) * jax.random.bernoulli(rngs["dropout"], 0.9, (len(x), WIDTH))
    lora = variables["lora"]
    logits = x @ variables["frozen"]["kernel"] + x @ lora["lora_a"] @ lora["lora_b"]
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, batch["labels"][:, None], -1)[:, 0]
    return jnp.sum(nll * batch["weights"]), jnp.sum(batch["weights"]), {}


def main(directory, total, kill_at=None, mid_save=False):
    """Returns the step it resumed at and the digest of all that it trained."""
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 3)
    variables = {
        "frozen": {
            "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
            "kernel": jax.random.normal(keys[1], (WIDTH, 3)),
        },
        "lora": {
            "lora_a": jax.random.normal(keys[2], (WIDTH, 2)),
            "lora_b": jnp.zeros((2, 3)),
        },
    }
    examples = [
        {"input_ids": rng.integers(0, VOCABULARY, n), "label": int(n % 3)}
        for n in rng.integers(1, 20, 41)
    ]
    batches = Batches(examples, batch_size=4, seed=1)
    tx = lora_optimizer(1e-2, total_steps=40, warmup_steps=4, weight_decay=0.1)
    state = TrainState.create(variables, tx, jax.random.key(7))
    step = make_train_step(loss_fn, tx, accumulate=2)
    with Checkpoints(
        directory,
        config={"rank": 2},
        fingerprint=fingerprint(variables["frozen"]),
        data=batches.identity(),
    ) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        first = int(state.step)
        for number in range(first, total):
            state, _ = step(state, batches.batch_at(number))
            if number == kill_at and mid_save:
                kill_once_writing(pathlib.Path(directory), number + 1)
            if number == kill_at or (number + 1) % 3 == 0:
                checkpoints.save(state)
            if number == kill_at and not mid_save:
                os.kill(os.getpid(), signal.SIGKILL)
        if kill_at is not None:
            os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((state.trainable, state.opt_state, state.skipped)):
        digest.update(np.asarray(leaf).tobytes())
    return first, digest.hexdigest()


def kill_once_writing(directory, step):
    """Kills this process as soon as the step's folder holds a file of its state."""

    def watch():
        while True:
            if any(directory.glob(f"{step}*/**/d/*")):
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "mid-save" in sys.argv)
