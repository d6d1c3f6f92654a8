"""Running readers on damaged inputs and monitoring them."""

import collections
import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.targets import TARGETS, Target

SECONDS = 10
BYTES = 1 << 30
EXPECTED = (ValueError, OSError)  # shown as a message by the command


class Finding(NamedTuple):
    """An input that a reader handled wrongly.

    Attributes:
      target: the reader.
      number: the input's number, which recreates it with the run's seed.
      what: what happened.
    """

    target: str
    number: int
    what: str


class Report(NamedTuple):
    """The results of a run.

    Attributes:
      counts: number of inputs by reader.
      refused: number of inputs rejected with an expected error, by reader.
      slowest: seconds of the slowest input, by reader.
      findings: the findings, once per kind and reader.
    """

    counts: collections.Counter[str]
    refused: collections.Counter[str]
    slowest: dict[str, float]
    findings: list[Finding]


class TooSlowError(BaseException):
    """An input that takes over 10 seconds."""


class Outside:
    """Detects files that Python writes outside a folder."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.is_on = str(folder), [], False
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, _, flags = args
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            is_write = isinstance(flags, int) and flags & writes
            if not is_write or not isinstance(path, str | bytes | os.PathLike):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link"):
            path = args[1] if event in ("os.rename", "os.symlink") else args[0]
        else:
            return
        full = os.path.realpath(os.fsdecode(path))
        if not full.startswith((self.folder, "/dev/null")):
            self.seen.append(f"{event} {full}")


def make_input(target: Target, seed: int, number: int, folder: Path) -> None:
    """Writes an input, the same for the same seed and number."""
    target.write(random.Random(f"{seed} {target.name} {number}"), folder)


def run(
    seed: int,
    *,
    seconds: float,
    targets: Sequence[Target] = TARGETS,
    most: int = sys.maxsize,
) -> Report:
    """Fuzzes for some seconds.

    Args:
      seed: seed of the inputs.
      seconds: time after which no new input is started.
      targets: the readers to fuzz.
      most: maximum number of inputs.
    """
    report = Report(collections.Counter(), collections.Counter(), {}, [])
    kinds: set[tuple[str, str]] = set()
    chooser, end = random.Random(seed), time.monotonic() + seconds
    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="fuzz")))
    outside = Outside(base)
    weights = [target.weight for target in targets]
    try:
        with _limits():
            for number in range(most):
                if time.monotonic() > end:
                    break
                if number % 100 == 0:  # of what no signal interrupts; starts a thread
                    faulthandler.dump_traceback_later(200 * SECONDS, exit=True)
                [target] = chooser.choices(targets, weights)
                folder = base / "input"
                folder.mkdir()
                make_input(target, seed, number, folder)
                what = _try(target, folder, report, outside)
                kind = (target.name, what.rpartition("\n")[2])
                if what and kind not in kinds:
                    kinds.add(kind)
                    report.findings.append(Finding(target.name, number, what))
                    print(f"{target.name} {number}: {what}", file=sys.stderr)
                shutil.rmtree(folder)
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(base, ignore_errors=True)
    return report


def _try(target: Target, folder: Path, report: Report, outside: Outside) -> str:
    """Reads an input; returns what went wrong, or the empty string."""
    report.counts[target.name] += 1
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what, outside.is_on = "", True
    names = [path.name for path in folder.iterdir()]
    signal.alarm(SECONDS)
    try:
        target.read(folder)
    except EXPECTED as error:
        report.refused[target.name] += 1
        if target.names_file and not any(n in str(error) for n in names):
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{error!r} names no file\nunnamed at {last.name}"
    except TooSlowError:
        what = f"over {SECONDS} s\nslow"
    except MemoryError:
        what = f"over {BYTES} bytes\nmemory"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{traceback.format_exc()}\n{type(error).__name__} at {last.name}"
    finally:
        signal.alarm(0)
        outside.is_on = False
    taken = time.monotonic() - start
    report.slowest[target.name] = max(taken, report.slowest.get(target.name, 0))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown * 1024 > BYTES:
        what = what or f"{grown >> 10} MiB more\nmemory"
    if outside.seen:
        what = what or f"{outside.seen[:3]}\nwrites outside"
        outside.seen.clear()
    return what


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Interrupts slow Python code, and limits memory."""

    def stop(*_: object) -> None:
        raise TooSlowError

    old = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = _data_bytes()
    if used is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, old)


def _data_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if "VmData" in line]
    return int(found[0]) << 10 if found else None
