"""The commands' output.

Without ``--json`` everything goes to stdout. With it, stdout gets a single JSON
document, and messages for people go to stderr. A terminal gets colours and a live
progress bar, a file or pipe plain lines.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lora_jax.finetune.formatting import to_json
from lora_jax.finetune.reporter import Reporter, Tick

SECONDS_BETWEEN_LINES = 5.0
PLAIN_WIDTH = 140


class _Rich(RichConsole):
    def on_broken_pipe(self) -> None:
        """Goes quiet: the reader may exit (`| head`), the run must not."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Console(Reporter):
    """Prints for people, and with ``as_json`` for programs."""

    def __init__(self, *, as_json: bool = False):
        self.as_json = as_json
        self._rich = _Rich(stderr=as_json, highlight=False, soft_wrap=True)
        self.is_live = self._rich.is_terminal
        if not self.is_live:
            self._rich.width = PLAIN_WIDTH  # no terminal to fit tables into

    def mute(self) -> None:
        """Prints nothing from now on, because another process does."""
        self.as_json, self.is_live, self._rich.quiet = False, False, True

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """Prints one line, without interpreting Rich markup."""
        self._rich.print(escape(text), style=style)

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Prints aligned ``name  value`` lines."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self._rich.print(f"  [dim]{escape(name):<{width}}[/]  {escape(value)}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints a table; numbers are right-aligned, words not broken."""
        table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        for i, column in enumerate(columns):
            is_number = all(isinstance(row[i], (int, float)) for row in rows)
            justify = "right" if is_number else "left"
            words = [word for row in rows for word in _cell(row[i]).split()]
            longest = max(map(len, [*words, *column.split()]))
            table.add_column(column, justify=justify, min_width=longest)
        for row in rows:
            table.add_row(*[escape(_cell(value)) for value in row])
        self._rich.print(table)

    def finish(self, result: dict[str, Any]) -> None:
        """Prints the result as JSON on stdout, with ``as_json``."""
        if self.as_json:
            print(to_json(result, indent=2), flush=True)

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Tick]:
        """Shows a live progress bar, or a plain line every few seconds."""
        if not self.is_live:
            yield self._lines(name, total)
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
        ]
        with Progress(*columns, console=self._rich, refresh_per_second=4) as bar:
            task = bar.add_task(name, total=total, note="")

            def show(done: int, note: str = "", *, quiet: bool = False) -> None:
                bar.update(task, completed=done, note=note)

            yield show

    def _lines(self, name: str, total: int) -> Tick:
        """Returns a `Tick` that prints a plain line every few seconds."""
        last = time.monotonic()

        def show(done: int, note: str = "", *, quiet: bool = False) -> None:
            nonlocal last
            now = time.monotonic()
            if not quiet and (done >= total or now - last >= SECONDS_BETWEEN_LINES):
                last = now
                self.say(f"  {name} {done}/{total}  {note}".rstrip())

        return show


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
