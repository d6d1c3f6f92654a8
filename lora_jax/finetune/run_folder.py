"""The run folder: one directory that holds all there is to know about a run.

``config.yaml`` (resolved), ``adapter/`` (the best so far), ``checkpoints/`` (Orbax),
``metrics.jsonl`` (a line a log step), ``summary.json`` and ``curves.png`` at the end.
"""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

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
from lora_jax.interop.pretrained import RUN_ADAPTER

ADAPTER = RUN_ADAPTER
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CURVES = "curves.png"
LOCK = ".lock"
OWN_NAMES = {CONFIG, ADAPTER, CHECKPOINTS, METRICS, SUMMARY, CURVES, LOCK}

# Settings that may change when a run is resumed: its result doesn't depend on them.
# (On another mesh, or where other values are computed again, sums are rounded in
# another order; nothing else is different.)
MESH = {f"mesh.{field.name}" for field in dataclasses.fields(MeshSettings)}
FREE = MESH | {
    "model.remat",
    "output.dir",
    "train.log_every",
    "train.save_every",
    "train.keep",
}


class RunFolder:
    """A run folder on disk, seen by all processes of a run and written by the first.

    Attributes:
      path: the folder.
      is_writer: whether this process writes; what it would write is dropped if not.
    """

    def __init__(self, path: str | Path, *, is_writer: bool = True):
        self.path, self.is_writer = Path(path), is_writer
        self._lock: Lock | None = None

    def __truediv__(self, name: str) -> Path:
        """Returns the path of a file in it."""
        return self.path / name

    def check(self, settings: RunSettings, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder can be used, before anything is computed.

        Args:
          settings: of the run that is to go there.
          resume: whether to go on with what is there.
          overwrite: whether what is there may be deleted.

        Raises:
          UserError: if there is something and neither was asked for; if it is another
            run's, or no run folder at all; or if it can't be written.
        """
        self.check_place()
        found = (
            sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        )
        # What a kill leaves of a run that was only about to start is nobody's.
        found = [n for n in found if n != LOCK and not atomic.is_leftover(n)]
        if resume:
            self._check_resume(settings)
        elif found and CONFIG not in found:
            raise UserError(
                f"{self.path} is not a run folder (it has no {CONFIG}, but "
                f"{found[0]!r}), and nothing there will be touched. Choose "
                "another output.dir."
            )
        elif found and not overwrite:
            raise UserError(
                f"{self.path} holds a run already ({self.state()}). Add --resume (in "
                "Python: resume=True) to go on with it, --overwrite (overwrite=True) "
                "to delete it, or choose another output.dir."
            )
        elif strange := sorted(set(found) - OWN_NAMES):
            raise UserError(
                f"{self.path} holds more than a run ({', '.join(strange)}), so it is "
                "not overwritten. Move that away first."
            )
        if found:
            self.lock()

    def check_place(self) -> None:
        """Raises a `UserError` if the folder is a file, or can't be written."""
        if self.path.is_file():
            raise UserError(f"output.dir {self.path} is a file; it must be a folder.")
        home = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not (home.is_dir() and os.access(home, os.W_OK)):
            raise UserError(
                f"output.dir {self.path} can't be written: {home} is not a folder, or "
                "not yours to write to. Choose another output.dir."
            )

    def lock(self) -> None:
        """Makes the folder this run's own, until this object or the process ends.

        Raises:
          UserError: naming the process whose it is.
        """
        if self._lock is not None:
            return
        try:
            self._lock = Lock(self / LOCK)
        except LockedError as error:
            raise UserError(
                f"a run in {self.path} is under way: {error}. Wait until it has ended, "
                "or choose another output.dir."
            ) from error

    def release(self) -> None:
        """Lets others have the folder again; does nothing if it isn't locked."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_resume(self, settings: RunSettings) -> None:
        if not self.is_started():
            raise UserError(
                f"nothing to resume: there is no run in {self.path}. Start one without "
                "--resume (in Python: resume=True)."
            )
        self.check_settings(
            settings, "Resume it as it was started, or choose another output.dir."
        )

    def check_settings(self, settings: RunSettings, advice: str) -> None:
        """Raises if the run's own settings differ from these where it matters.

        Args:
          settings: what was asked for.
          advice: the way out, for the error.

        Raises:
          UserError: naming every difference.
        """
        old = load_settings(self / CONFIG)
        changed = [d for d in differences(old, settings) if d.split(":")[0] not in FREE]
        if changed:
            raise UserError(
                f"the run in {self.path} was started with other settings:\n  "
                + "\n  ".join(changed)
                + f"\n{advice}"
            )

    def is_started(self) -> bool:
        """Says whether there is a run in the folder."""
        return (self / CONFIG).is_file()

    def state(self) -> str:
        """Says in a few words how far the run in the folder is."""
        if (self / SUMMARY).is_file():
            return "finished"
        lines = self.metrics()
        step = max((line["step"] for line in lines), default=0)
        if any(x["split"] == "validation" and x["loss"] is None for x in lines):
            return f"diverged at step {step}"
        return f"unfinished, at step {step}"

    def create(self, settings: RunSettings, *, overwrite: bool) -> None:
        """Makes the folder and writes the resolved config.

        Args:
          settings: of the run.
          overwrite: delete the run that is there; `check` has looked at it.

        Raises:
          UserError: if the folder can't be made, or another process has just made it.
        """
        if not self.is_writer:
            return
        if overwrite and self.path.exists():
            # The config last: without it the remains of a killed run are not a run.
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
                f"output.dir {self.path} can't be made: {error.strerror}. Choose "
                "another output.dir."
            ) from error
        self.lock()
        if self.is_started():  # since `check`: nobody else starts one under the lock
            raise UserError(
                f"another process has just started a run in {self.path}. Processes of "
                "one run must be joined (--distributed, or --coordinator and its "
                "options; in Python jax.distributed.initialize); another run needs "
                "another output.dir."
            )
        atomic.write_text(self / CONFIG, settings.to_yaml())

    def check_space(self, needed: int) -> None:
        """Raises if the disk has not ``needed`` bytes left.

        Args:
          needed: bytes that the run is going to write.

        Raises:
          UserError: saying how much is missing.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"the disk of {self.path} has {size(free)} free; this run needs about "
                f"{size(needed)}. Free some space, or lower train.keep.",
                code=1,
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl; a last line cut short is left out."""
        if not (self / METRICS).is_file():
            return []
        lines = []
        for text in (self / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # a kill in the middle of a line
        return lines

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines of metrics.jsonl after ``step``; returns those that stay."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(to_json(line) + "\n" for line in kept)
        self._replace(METRICS, text)
        if self.is_writer:
            (self / SUMMARY).unlink(missing_ok=True)
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if self.is_writer:
            atomic.append_text(self / METRICS, to_json(line) + "\n")

    def summarise(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._replace(SUMMARY, to_json(summary, indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        if not self.is_writer:
            return
        atomic.write_text(self / name, text)


def open_run(path: str | Path) -> tuple[RunFolder, RunSettings]:
    """Opens a run folder that exists.

    Args:
      path: the folder.

    Returns:
      The folder and its settings.

    Raises:
      UserError: if it is not a run folder, or has no adapter yet.
    """
    run = RunFolder(path)
    if not run.is_started():
        raise UserError(f"{path} is not a run folder: it has no {CONFIG}.")
    if not (run / ADAPTER / adapter.CONFIG).is_file():
        raise UserError(
            f"the run in {path} has no adapter yet ({run.state()}): its first "
            f"validation writes it. `lora-jax train {path} --resume` (in Python: "
            "fine_tune(folder, resume=True)) goes on with it."
        )
    return run, load_settings(run / CONFIG)
