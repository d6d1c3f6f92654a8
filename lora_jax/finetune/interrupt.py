"""While a run is under way: Ctrl-C, the pace, and what the library has to say."""

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
    """Turns the first Ctrl-C (or SIGTERM) into a request, the second into an exception.

    Args:
      out: where to say so.

    Yields:
      A function that says whether a stop was asked for.
    """
    asked = threading.Event()

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        out.say("\nStopping after the steps under way (again to stop at once) ...")

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
    """Keeps the pace of a run and words it.

    Attributes:
      note: the last report in words, with the pace and the time left.
    """

    def __init__(self, total_steps: int, unit: str):
        self._total, self._unit, self._seconds = total_steps, unit, 0.0
        self.note = ""

    def add(self, progress: Progress, first: int) -> None:
        """Takes in a report.

        Args:
          progress: the report.
          first: the step that this start of the run began at.
        """
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
    """Shows the library's warnings (a damaged checkpoint, say) to whoever watches."""

    def __init__(self, out: Reporter):
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        self._out.say(record.getMessage(), style="yellow")
