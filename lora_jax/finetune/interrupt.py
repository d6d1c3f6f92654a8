"""Handling Ctrl-C, timing and the library's warnings during a run."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

from lora_jax.finetune.formatting import duration
from lora_jax.finetune.reporter import Reporter
from lora_jax.train.loop import Progress


@contextlib.contextmanager
def interruptible(out: Reporter) -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C (or SIGTERM) a stop request, the second an exception.

    Args:
      out: where to report it.

    Yields:
      A function that returns whether a stop was requested.
    """
    asked = threading.Event()

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        out.say("\nStopping after the current steps (again to stop immediately) ...")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may set handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield asked.is_set
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Clock:
    """Measures the speed of a run.

    Attributes:
      note: the last report as text, with the speed and the time left.
    """

    def __init__(self, total_steps: int, unit: str):
        self._total, self._unit, self._seconds = total_steps, unit, 0.0
        self.note = ""

    def add(self, progress: Progress, first: int) -> None:
        """Adds a report of a run that was started or resumed at step ``first``."""
        self._seconds += progress.seconds
        left = self._total - progress.step
        eta = self._seconds / (progress.step - first) * left
        words = [f"loss {progress.metrics['loss']:.3f}"]
        if "accuracy" in progress.metrics:
            words.append(f"accuracy {progress.metrics['accuracy']:.1%}")
        pace = progress.examples / progress.seconds
        words += [f"{pace:.0f} {self._unit}/s", f"ETA {duration(eta)}"]
        self.note = "  ".join(words)


class Relay(logging.Handler):
    """Forwards the library's warnings (e.g. a damaged checkpoint) to a reporter."""

    def __init__(self, out: Reporter):
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        self._out.say(record.getMessage(), style="yellow")
