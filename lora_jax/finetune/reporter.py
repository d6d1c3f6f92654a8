"""Reporting a run's progress: the silent base class of all front ends."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Tick(Protocol):
    """Updates a progress display."""

    def __call__(self, done: int, note: str = "", *, quiet: bool = False) -> None:
        """Shows that ``done`` units are completed.

        Args:
          done: number of completed units.
          note: short text beside the bar.
          quiet: update only a progress bar; print nothing if there is none.
        """
        ...


class Reporter:
    """Receives a run's output; this base class discards it.

    A front end overrides `say`, which the other methods use, and any others it wants.

    Attributes:
      resume: the code or command with which the user resumes a stopped run.

    Example:
      >>> class Printer(Reporter):
      ...     def say(self, text="", *, style=None):
      ...         print(text)
      >>> Printer().facts([("rank", "8"), ("alpha", "16")])
        rank   8
        alpha  16
    """

    resume: str = "fine_tune(config, resume=True)"

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """Outputs one line.

        Args:
          text: the line.
          style: "bold" or a colour, if supported.
        """

    def heading(self, text: str) -> None:
        """Outputs a heading."""
        self.say()
        self.say(text, style="bold")

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Outputs aligned ``name  value`` lines."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.say(f"  {name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Outputs a table."""
        for row in (columns, *rows):
            self.say("  " + "  ".join(map(str, row)))

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Tick]:
        """Shows progress towards ``total`` until the block ends.

        Args:
          name: label of the task.
          total: number of units.

        Yields:
          A `Tick`, to be called with the number of completed units and a short note.
        """
        del name, total
        yield _dropped


def _dropped(done: int, note: str = "", *, quiet: bool = False) -> None:
    del done, note, quiet
