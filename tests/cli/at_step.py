"""Runs `lora-jax` and signals itself at a step; run by the tests of many devices.

Usage: ``python -m tests.cli.at_step STEP SIGNAL COMMAND ...``; step -1 never comes, and
``4s`` is the moment when the checkpoint of step 4 is being written; at a plain step all
checkpoints before it are. Commands in one process are parted by ``--and``, and the
signal is for the first.
"""

import os
import signal
import sys

from lora_jax.cli.main import main
from lora_jax.files.checkpoint import Checkpoints
from lora_jax.train.buckets import Schedule

batch_at, save = Schedule.batch_at, Checkpoints.save


def run(when: str, number: int, words: list[str]) -> int:
    opened: list[Checkpoints] = []

    def signalling(self, index, *rows):
        if self.shuffle and index and str(index - 1) == when:  # it is being taken
            for checkpoints in opened:
                checkpoints.wait()
            os.kill(os.getpid(), number)
        return batch_at(self, index, *rows)

    def saving(self, state, *metrics):
        opened[:] = [self]
        save(self, state, *metrics)
        if f"{int(state.step)}s" == when:
            os.kill(os.getpid(), number)

    Schedule.batch_at, Checkpoints.save = signalling, saving
    return main(words)


if __name__ == "__main__":
    when, number, rest = sys.argv[1], getattr(signal, sys.argv[2]), sys.argv[3:]
    while "--and" in rest:
        cut = rest.index("--and")
        run(when, number, rest[:cut])
        when, rest = "-1", rest[cut + 1 :]
    sys.exit(run(when, number, rest))
