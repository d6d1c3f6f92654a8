"""The run folder, which contains everything about a run.

``config.yaml`` (resolved), ``adapter/`` (the best so far; ``adapters/NAME/`` of each if
the examples name theirs), ``start/`` (the first, of methods that need it to the end),
``checkpoints/`` (Orbax),
``metrics.jsonl`` (a line per log step), ``summary.json`` and ``curves.png`` at the end.
"""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from lora_jax.files import adapter, atomic
from lora_jax.files.lock import Lock, LockedError
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size, to_json
from lora_jax.finetune.sections import MeshSettings
from lora_jax.finetune.settings import (
    CONFIG,
    RunSettings,
    differences,
    load_settings,
)
from lora_jax.interop.adapter_folder import RUN_ADAPTER, RUN_ADAPTERS, adapter_folders

ADAPTER, ADAPTERS = RUN_ADAPTER, RUN_ADAPTERS
START = "start"  # the first adapters, of methods that need them later
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CURVES = "curves.png"
LOCK = ".lock"
OWN_NAMES = {CONFIG, ADAPTER, ADAPTERS, START, CHECKPOINTS, METRICS, SUMMARY, CURVES}
OWN_NAMES |= {LOCK}

# Settings that may change when a run is resumed: its result doesn't depend on them
# (except for rounding, on another mesh or with another remat policy).
MESH = {f"mesh.{field.name}" for field in dataclasses.fields(MeshSettings)}
FREE = MESH | {
    "model.remat",
    "output.dir",
    "train.log_every",
    "train.save_every",
    "train.keep",
}


def fixed_differences(old: RunSettings, new: RunSettings) -> list[str]:
    """Returns the `differences` that keep a run from being resumed."""
    return [d for d in differences(old, new) if d.split(":")[0] not in FREE]


class OutputFolder:
    """A folder that one process at a time writes.

    Attributes:
      path: the folder.
      content: what it is the folder of, for messages.
    """

    content: ClassVar[str]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock: Lock | None = None

    def __truediv__(self, name: str) -> Path:
        """Returns the path of a file in the folder."""
        return self.path / name

    def names(self) -> list[str]:
        """Returns what is in the folder, but for what a killed process left."""
        names = [p.name for p in self.path.iterdir()] if self.path.exists() else []
        return sorted(n for n in names if n != LOCK and not atomic.is_leftover(n))

    def check_place(self) -> None:
        """Raises a `UserError` if the folder is a file, or can't be written."""
        if self.path.is_file():
            raise UserError(f"output.dir {self.path} is a file; it must be a folder.")
        home = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not (home.is_dir() and os.access(home, os.W_OK)):
            raise UserError(
                f"output.dir {self.path} can't be written: {home} is not a folder, or "
                "not writable. Choose another output.dir."
            )

    def lock(self) -> None:
        """Locks the folder until `release`, or until this object or the process ends.

        Raises:
          UserError: if another process has locked it; names the process.
        """
        if self._lock is not None:
            return
        try:
            self._lock = Lock(self / LOCK)
        except LockedError as error:
            raise UserError(
                f"a {self.content} in {self.path} is in progress: {error}. Wait until "
                "it has ended, or choose another output.dir."
            ) from error

    def release(self) -> None:
        """Unlocks the folder if it is locked."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class RunFolder(OutputFolder):
    """A run folder, visible to all processes of a run and written by the first.

    Attributes:
      is_writer: whether this process writes; otherwise writing has no effect.
    """

    content: ClassVar[str] = "run"

    def __init__(self, path: str | Path, *, is_writer: bool = True):
        super().__init__(path)
        self.is_writer = is_writer

    def check(self, settings: RunSettings, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder can be used, before anything is computed.

        Args:
          settings: settings of the run to be started or resumed.
          resume: whether to resume an existing run.
          overwrite: whether an existing run may be deleted.

        Raises:
          UserError: if the folder is in use and neither was requested; if it contains
            a different run or other files; or if it can't be written.
        """
        self.check_place()
        found = self.names()
        if resume:
            self._check_resume(settings)
        elif found and CONFIG not in found:
            raise UserError(
                f"{self.path} is not a run folder (it has no {CONFIG}, but "
                f"{found[0]!r}), so it was not changed. Choose another output.dir."
            )
        elif found and not overwrite:
            raise UserError(
                f"{self.path} already contains a run ({self.state()}). Use --resume "
                "(in Python: resume=True) to resume it, --overwrite (overwrite=True) "
                "to delete it, or choose another output.dir."
            )
        elif others := sorted(set(found) - OWN_NAMES):
            raise UserError(
                f"{self.path} contains other files than a run's ({', '.join(others)}), "
                "so it was not overwritten. Move them away first."
            )
        if found:
            self.lock()

    def _check_resume(self, settings: RunSettings) -> None:
        if not self.is_started():
            raise UserError(
                f"nothing to resume: there is no run in {self.path}. Start one without "
                "--resume (in Python: resume=True)."
            )
        advice = "Resume it with its own settings, or choose another output.dir."
        self.check_settings(settings, advice)

    def check_settings(self, settings: RunSettings, advice: str) -> None:
        """Raises a `UserError` with ``advice`` if settings that matter differ."""
        if changed := fixed_differences(load_settings(self / CONFIG), settings):
            lines = "\n  ".join(changed)
            raise UserError(
                f"the run in {self.path} was started with other settings:\n  {lines}"
                f"\n{advice}"
            )

    def is_started(self) -> bool:
        """Returns whether there is a run in the folder."""
        return (self / CONFIG).is_file()

    def state(self) -> str:
        """Describes the progress of the run in the folder."""
        if (self / SUMMARY).is_file():
            return "finished"
        lines = self.metrics()
        step = max((line["step"] for line in lines), default=0)
        if any(x["split"] == "validation" and x["loss"] is None for x in lines):
            return f"diverged at step {step}"
        return f"unfinished, at step {step}"

    def create(self, settings: RunSettings, *, overwrite: bool) -> None:
        """Creates the folder and writes the resolved config.

        Args:
          settings: settings of the run.
          overwrite: whether to delete an existing run, already checked by `check`.

        Raises:
          UserError: if the folder can't be created, or another process just did.
        """
        if not self.is_writer:
            return
        if overwrite and self.path.exists():
            # The config last, so that an interrupted deletion is still a run folder.
            old = {p.name for p in self.path.iterdir() if atomic.is_leftover(p.name)}
            old |= OWN_NAMES - {LOCK}
            for name in sorted(old, key=lambda name: name == CONFIG):
                target = self / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(
                f"output.dir {self.path} can't be created: {error.strerror}. Choose "
                "another output.dir."
            ) from error
        self.lock()
        if self.is_started():  # since `check`; now the lock prevents that
            raise UserError(
                f"another process has just started a run in {self.path}. Processes of "
                "one run must be joined (--distributed, or --coordinator and its "
                "options; in Python jax.distributed.initialize); another run needs "
                "another output.dir."
            )
        atomic.write_text(self / CONFIG, settings.to_yaml())

    def check_space(self, needed: int) -> None:
        """Raises a `UserError` if fewer than ``needed`` bytes are free on the disk."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"the disk of {self.path} has {size(free)} free; this run needs about "
                f"{size(needed)}. Free some space, or lower train.keep.",
                code=1,
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without an incomplete last one."""
        if not (self / METRICS).is_file():
            return []
        lines = []
        for text in (self / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the process was killed while writing a line
        return lines

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Removes the lines of metrics.jsonl after ``step``; returns the others."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if self.is_writer:
            text = "".join(to_json(line) + "\n" for line in kept)
            atomic.write_text(self / METRICS, text)
            (self / SUMMARY).unlink(missing_ok=True)
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if self.is_writer:
            atomic.append_text(self / METRICS, to_json(line) + "\n")

    def summarise(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        if self.is_writer:
            atomic.write_text(self / SUMMARY, to_json(summary, indent=2) + "\n")


def open_run(path: str | Path) -> tuple[RunFolder, RunSettings]:
    """Opens an existing run folder; returns it and its settings.

    Raises:
      UserError: if it is not a run folder, or has no adapter yet.
    """
    run = RunFolder(path)
    if not run.is_started():
        raise UserError(f"{path} is not a run folder: it has no {CONFIG}.")
    if not (
        (run / ADAPTER / adapter.CONFIG).is_file() or adapter_folders(run / ADAPTERS)
    ):
        raise UserError(
            f"the run in {path} has no adapter yet ({run.state()}): its first "
            f"validation writes it. `lora-jax train {path} --resume` (in Python: "
            "fine_tune(folder, resume=True)) resumes it."
        )
    return run, load_settings(run / CONFIG)
