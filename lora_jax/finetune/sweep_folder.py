"""The folder of a sweep: what runs there are, how they ended, and the best of them."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lora_jax.files import atomic
from lora_jax.files.json_file import read_json
from lora_jax.finetune.curves import draw_curves, draw_sweep
from lora_jax.finetune.errors import DivergedError, UserError
from lora_jax.finetune.formatting import count_of, to_json
from lora_jax.finetune.report import title
from lora_jax.finetune.run_folder import (
    CHECKPOINTS,
    CURVES,
    LOCK,
    SUMMARY,
    OutputFolder,
    RunFolder,
    fixed_differences,
)
from lora_jax.finetune.sections import OutputSettings
from lora_jax.finetune.settings import CONFIG, load_settings
from lora_jax.finetune.sweep_grid import Point

RECORD = "sweep.json"  # the runs, and how those ended that have
KEYS = ("runs", "together", "ended")  # of the record
BEST = "best"
PLOT = "sweep.png"
OPTIONS = "--resume (in Python: resume=True)"


class SweepFolder(OutputFolder):
    """The folder of a sweep: `RECORD`, a run folder for each run, ``best/``, the plot.

    Attributes:
      lines: how each run ended that has, by name.
      together: how many runs of each group train side by side.
    """

    content: ClassVar[str] = "sweep"

    def __init__(self, path: str, points: Sequence[Point]) -> None:
        super().__init__(Path(path).parent)  # of the runs' folders
        self.points = points
        self.lines: dict[str, dict[str, Any]] = {}
        self.together: dict[str, int] = {}

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder can be used, before anything is computed.

        Args:
          resume: whether to continue the sweep in it.
          overwrite: whether its contents may be deleted.

        Raises:
          UserError: if it can't.
        """
        self.check_place()
        found = self.names()
        if RECORD not in found:
            if resume:
                raise UserError(f"nothing to resume: there is no sweep in {self.path}.")
            if found:
                raise UserError(
                    f"{self.path} is not a sweep's folder (it contains {found[0]!r}). "
                    "Nothing was changed: choose another output.dir."
                )
            return
        if not (resume or overwrite):
            raise UserError(
                f"{self.path} already contains a sweep. Add {OPTIONS} to continue it, "
                "--overwrite (overwrite=True) to delete it, or choose another "
                "output.dir."
            )
        self.lock()
        record = read_json(self / RECORD)
        if not all(isinstance(record.get(key), dict) for key in KEYS):
            raise UserError(
                f"{self / RECORD} must have {', '.join(KEYS)}: it is not a "
                "sweep's, or was changed."
            )
        if resume:
            self._check_same(record["runs"])
            self.lines, self.together = record["ended"], record["together"]
        else:
            own = {RECORD, PLOT, BEST, *record["runs"]}
            if strange := sorted(set(found) - own):
                raise UserError(
                    f"{self.path} holds more than a sweep ({', '.join(strange)}), so "
                    "it is not overwritten. Move that away first."
                )

    def _check_same(self, runs: Mapping[str, Any]) -> None:
        here = {point.name: point.settings for point in self.points}
        changed = [f"{name}: not in this grid" for name in runs if name not in here]
        changed += [f"{name}: new" for name in here if name not in runs]
        for name in sorted(runs.keys() & here.keys()):
            found = fixed_differences(load_settings(runs[name]), here[name])
            changed += [f"{name}: {d}" for d in found]
        if changed:
            raise UserError(
                f"the sweep in {self.path} was started with another grid or config:\n  "
                + "\n  ".join(changed[:12])
                + "\nResume it as it was started, or choose another output.dir."
            )

    def open(self, number: int, together: int, *, overwrite: bool) -> None:
        """Makes the folder if this is the first group; notes how a group is trained.

        Args:
          number: of the group.
          together: how many of its runs train side by side.
          overwrite: whether to delete the sweep that is there.
        """
        if overwrite and not self.together and self.path.exists():
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name not in (LOCK, RECORD):
                    entry.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.together[str(number)] = together
        self._write()

    def _write(self) -> None:
        record = {
            "runs": {point.name: point.settings.to_dict() for point in self.points},
            "together": self.together,
            "ended": self.lines,
        }
        atomic.write_text(self / RECORD, to_json(record, indent=1) + "\n")

    def add(
        self,
        point: Point,
        metric: str,
        summary: Mapping[str, Any] | None,
        error: DivergedError | None,
    ) -> dict[str, Any]:
        """Notes how a run ended.

        Args:
          point: the run.
          metric: that selects the best.
          summary: of a run that is done.
          error: of a run that diverged.

        Returns:
          Its line.
        """
        line = {
            "name": point.name,
            "values": point.values,
            "status": "diverged" if error else "done",
            "metric": metric,
            "validation": summary and summary["validation"],
            "test": summary and summary["test"],
            "warning": str(error) if error else summary and summary["warning"],
            "folder": point.settings.output.dir,
        }
        self.lines[point.name] = line
        self._write()
        return line

    def how_to_resume(self, command: str) -> str:
        """Describes what is saved, and how to go on with ``command``."""
        if not self.together:
            return "Nothing was written yet; start it again."
        ended, total = len(self.lines), count_of(self.points)
        return (
            f"{ended} of {total} have ended; the others resume from their last "
            f"checkpoints. Continue with\n  {command}"
        )

    def finish(self) -> tuple[Path, list[dict[str, Any]], str, Path | None]:
        """Sorts the runs, draws them, and copies the best.

        Returns:
          What a `Sweep` holds.
        """
        points = self.points
        lines = [  # the folder may have been moved since
            {**self.lines[point.name], "folder": point.settings.output.dir}
            for point in points
        ]
        metric = lines[0]["metric"]
        settings = [point.settings for point in points]
        is_drawn = draw_sweep(settings, lines, self / PLOT, metric)
        sign = 1 if metric == "loss" else -1

        def place(line: dict[str, Any]) -> tuple[bool, float]:
            found = line["validation"] and line["validation"].get(metric)
            return (found is None, 0.0 if found is None else sign * found)

        lines.sort(key=place)
        if lines[0]["status"] == "done":
            best = Path(lines[0]["folder"])
            kept = [p for p in best.iterdir() if p.name not in (CHECKPOINTS, LOCK)]
            shutil.rmtree(self / BEST, ignore_errors=True)
            with atomic.new_folder(self / BEST) as new:
                for path in kept:
                    copy = shutil.copytree if path.is_dir() else shutil.copy2
                    copy(path, new / path.name)
                output = OutputSettings(str(self / BEST))
                own = load_settings(best)
                own = dataclasses.replace(own, output=output)
                atomic.write_text(new / CONFIG, own.to_yaml())
                _draw_run(best, new / CURVES)
        return self.path, lines, metric, self / PLOT if is_drawn else None


def _draw_run(folder: Path, image: Path) -> None:
    """Draws the curves of a run that has ended, from its files."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    metrics = [name for name in summary["validation"] if name != "step"]
    baseline = summary["baseline"]
    value = baseline and baseline.get(f"validation_{summary['metric']}")
    draw_curves(
        RunFolder(folder).metrics(),
        image,
        title=title(load_settings(folder), summary["parameters"]),
        metrics=metrics,
        baseline=None if value is None else (baseline["what"], value),
        chosen=summary["validation"]["step"],
    )
