"""Runs `lora-jax` and signals itself at a step; run by the tests of many devices.

Usage: ``python -m tests.cli.at_step STEP SIGNAL COMMAND ...``; step -1 never comes.
Commands in one process are parted by ``--and``, and the signal is for the first.
"""

import os
import signal
import sys

from lora_jax.cli.main import main
from lora_jax.train.buckets import Schedule

batch_at = Schedule.batch_at


def run(step: int, number: int, words: list[str]) -> int:
    def signalling(self, index, *rows):
        if self.shuffle and index == step:
            os.kill(os.getpid(), number)
        return batch_at(self, index, *rows)

    Schedule.batch_at = signalling
    return main(words)


if __name__ == "__main__":
    step, number, rest = int(sys.argv[1]), getattr(signal, sys.argv[2]), sys.argv[3:]
    while "--and" in rest:
        cut = rest.index("--and")
        run(step, number, rest[:cut])
        step, rest = -1, rest[cut + 1 :]
    sys.exit(run(step, number, rest))
