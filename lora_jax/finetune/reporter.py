"""What a run tells whoever started it: the base of all front ends, itself silent."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Tick(Protocol):
    """Shows how far something is."""

    def __call__(self, done: int, note: str = "", *, quiet: bool = False) -> None:
        """Shows that ``done`` units are through.

        Args:
          done: how many.
          note: a few words beside the bar.
          quiet: moves a bar, but is not worth a line where there is no bar.
        """
        ...


class Reporter:
    """Takes in what a run says while it goes on; this one drops it.

    A front end overrides `say`, which the others use, and what it shows better.

    Attributes:
      resume: how its user goes on with a run that was stopped, as code or a command.

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
        """Says one line.

        Args:
          text: the line.
          style: how to show it, "bold" or a colour, where there are any.
        """

    def heading(self, text: str) -> None:
        """Begins a part of what is said."""
        self.say()
        self.say(text, style="bold")

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Says aligned ``name  value`` lines."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.say(f"  {name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Says a table."""
        for row in (columns, *rows):
            self.say("  " + "  ".join(map(str, row)))

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Tick]:
        """Shows progress towards ``total`` until the block ends.

        Args:
          name: what is being done.
          total: how many units there are.

        Yields:
          A `Tick` to be called with the units done and a few words about them.
        """
        del name, total
        yield _dropped


def _dropped(done: int, note: str = "", *, quiet: bool = False) -> None:
    del done, note, quiet
