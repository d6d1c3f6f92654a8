"""`sweep`: a config and a grid of settings in; run folders and a table out."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.files import atomic
from lora_jax.files.lock import Lock, LockedError
from lora_jax.finetune.errors import DivergedError, Interrupted, UserError
from lora_jax.finetune.formatting import metric_text, to_json
from lora_jax.finetune.interrupt import interruptible
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import CHECKPOINTS, FREE, LOCK, RunFolder
from lora_jax.finetune.settings import Config, RunSettings, differences, load_settings
from lora_jax.finetune.sweep_grid import Grid, Point, expand, groups
from lora_jax.finetune.sweep_group import Group, Member
from lora_jax.finetune.sweep_plot import PLOT, draw_sweep
from lora_jax.names import MEMBER

RECORD = "sweep.json"  # the runs, and how those ended that have
BEST = "best"
OPTIONS = "--resume (in Python: resume=True)"


class Sweep(NamedTuple):
    """A sweep that is finished.

    Attributes:
      path: its folder: one of each run, and ``best/``, a copy of the best of them.
      runs: the best first: each run's ``name``, its ``values`` by setting,
        ``validation`` and ``test`` metrics, ``folder``, and ``status``, ``"done"`` or
        ``"diverged"``.
      metric: the metric by which they are sorted.
      plot: it against the learning rate, a line a rank; None without matplotlib.
    """

    path: Path
    runs: list[dict[str, Any]]
    metric: str
    plot: Path | None


def sweep(
    config: Config,
    grid: Grid,
    *,
    zipped: bool = False,
    together: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Sweep:
    """Fine-tunes all combinations of a grid's settings; what `lora-jax sweep` does.

    Runs train side by side in one compiled step over one frozen base, each with its own
    learning rate and schedule, rank, alpha, weight decay, seed, order of the data,
    early stopping and best adapter. Each gives what `fine_tune` gives for its settings, up to
    the order of float32 sums (1e-5 relative). Runs that differ in what a step is
    compiled for, such as the batch size or the dropout, train after one another.

    Args:
      config: of all runs, as for `fine_tune`; ``output.dir`` is the sweep's folder.
      grid: values by setting, ``{"train.learning_rate": [1e-4, 1e-3]}``, or the words
        of the command, ``["train.learning_rate=1e-4,1e-3", "seed=0..2"]``.
      zipped: whether the n-th values belong together, instead of all combinations.
      together: how many runs train side by side; None takes what is fastest.
      resume: whether to go on with the sweep in the folder.
      overwrite: whether a sweep that is in the folder is deleted.
      reporter: takes in what is said meanwhile; None says nothing.

    Returns:
      The finished sweep.

    Raises:
      FileNotFoundError: if a file or the model is missing.
      ValueError: naming every fault of the grid and of the settings.
      UserError: if the folder is taken, a setting can't be swept, or not even one run
        fits the device.
      Interrupted: a `KeyboardInterrupt` that says how to go on.
    """
    out = reporter or Reporter()
    if resume and overwrite:
        raise ValueError("resume and overwrite must not both be set; choose one.")
    if together is not None and together < 1:
        raise ValueError(f"together must be at least 1; got {together}.")
    if jax.process_count() > 1:
        raise UserError("a sweep is one process; start it without --distributed.")
    points = expand(config, grid, zipped=zipped)
    sorted_, differing = groups(points)
    mesh = _member_mesh(points[0].settings, min(map(len, sorted_)))
    folder = SweepFolder(points[0].settings.output.dir, points)
    with contextlib.ExitStack() as stack:
        folder.check(resume=resume, overwrite=overwrite)
        out.heading(f"A sweep of {len(points)} runs")
        if differing:
            shown = ", ".join(differing)
            out.say(
                f"  {len(sorted_)} steps, one after another: they differ in {shown}"
            )
        stop = stack.enter_context(interruptible(out))
        stack.callback(folder.release)
        for number, group in enumerate(sorted_):
            left = [point for point in group if not folder.ended(point)]
            if not left:
                continue
            runs = Group(group, out, mesh, stop)
            count = runs.choose(folder.together.get(str(number), together))
            folder.open(number, count, overwrite=overwrite)
            out.say(f"  {len(left)} runs, {count} side by side")

            def on_end(
                member: Member,
                summary: dict[str, Any] | None,
                error: DivergedError | None,
                metric: str = runs.job.metric,
            ) -> None:
                line = folder.add(member.point, metric, summary, error)
                found = line["validation"] or {}
                shown = metric_text(metric, found.get(metric))
                said = "diverged" if error else f"validation {metric} {shown}"
                out.say(f"  {member.point.name}: {said}")

            try:
                runs.train(left, count, on_end)
            except KeyboardInterrupt:
                said = "interrupted; every run has its checkpoint. Go on with\n  "
                raise Interrupted(said + out.resume, is_orderly=True) from None
        return folder.finish(points)


def _member_mesh(settings: RunSettings, runs: int) -> Mesh | None:
    """Returns the mesh that splits runs over devices, or None for one device."""
    own, devices = settings.mesh, jax.devices()
    wanted = own.member
    if own.member == 1 and own.data == -1:
        wanted = min(len(devices), runs)  # what is left, as for a run's data axis
    if own.data not in (-1, 1) or own.fsdp != 1 or own.tensor != 1:
        raise UserError(
            "mesh.data, fsdp and tensor must be 1 in a sweep, whose runs are split "
            f"over mesh.member; got {own.data}, {own.fsdp}, {own.tensor}."
        )
    if wanted > len(devices):
        raise UserError(
            f"mesh.member must be at most the {len(devices)} devices; got {wanted}."
        )
    if wanted == 1:
        return None
    return jax.make_mesh(
        (wanted,), (MEMBER,), axis_types=(AxisType.Auto,), devices=devices[:wanted]
    )


class SweepFolder:
    """The folder of a sweep: `RECORD`, a run folder for each run, ``best/``, the plot.

    Attributes:
      path: the folder.
      lines: how each run ended that has, by name.
      together: how many runs of each group train side by side.
    """

    def __init__(self, path: str, points: Sequence[Point]) -> None:
        self.path = Path(path).parent  # of the runs' folders
        self.points = points
        self.lines: dict[str, dict[str, Any]] = {}
        self.together: dict[str, int] = {}
        self._lock: Lock | None = None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder can be used, before anything is computed.

        Args:
          resume: whether to go on with what is there.
          overwrite: whether what is there may be deleted.

        Raises:
          UserError: if it can't.
        """
        RunFolder(self.path).check_place()
        found = [p.name for p in self.path.iterdir()] if self.path.exists() else []
        found = [
            name for name in found if name != LOCK and not atomic.is_leftover(name)
        ]
        if RECORD not in found:
            if resume:
                raise UserError(f"nothing to resume: there is no sweep in {self.path}.")
            if found:
                raise UserError(
                    f"{self.path} is not a sweep's folder (it holds {found[0]!r}), and "
                    "nothing there will be touched. Choose another output.dir."
                )
            return
        if not (resume or overwrite):
            raise UserError(
                f"{self.path} holds a sweep already. Add {OPTIONS} to go on with it, "
                "--overwrite (overwrite=True) to delete it, or choose another "
                "output.dir."
            )
        self._take()
        record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
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
            found = differences(load_settings(runs[name]), here[name])
            changed += [f"{name}: {d}" for d in found if d.split(":")[0] not in FREE]
        if changed:
            raise UserError(
                f"the sweep in {self.path} was started with another grid or config:\n  "
                + "\n  ".join(changed[:12])
                + "\nResume it as it was started, or choose another output.dir."
            )

    def _take(self) -> None:
        if self._lock is None:
            try:
                self._lock = Lock(self.path / LOCK)
            except LockedError as error:
                raise UserError(f"a sweep is under way: {error}.") from error

    def open(self, number: int, together: int, *, overwrite: bool) -> None:
        """Makes the folder if this is the first group; notes how a group is trained.

        Args:
          number: of the group.
          together: how many of its runs train side by side.
          overwrite: whether to delete the sweep that is there.
        """
        if overwrite and not self.together:
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name not in (LOCK, RECORD):
                    entry.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        self.together[str(number)] = together
        self._write()

    def _write(self) -> None:
        record = {
            "runs": {point.name: point.settings.to_dict() for point in self.points},
            "together": self.together,
            "ended": self.lines,
        }
        atomic.write_text(self.path / RECORD, to_json(record, indent=1) + "\n")

    def release(self) -> None:
        """Lets others have the folder again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def ended(self, point: Point) -> bool:
        """Says whether a run has ended."""
        return point.name in self.lines

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

    def finish(self, points: Sequence[Point]) -> Sweep:
        """Sorts the runs, draws them, and copies the best.

        Args:
          points: all runs.

        Returns:
          The sweep.
        """
        lines = [self.lines[point.name] for point in points]
        metric = lines[0]["metric"]
        settings = [point.settings for point in points]
        is_drawn = draw_sweep(settings, lines, self.path / PLOT, metric)
        sign = 1 if metric == "loss" else -1

        def place(line: dict[str, Any]) -> tuple[bool, float]:
            found = line["validation"] and line["validation"].get(metric)
            return (found is None, 0.0 if found is None else sign * found)

        lines.sort(key=place)
        if lines[0]["status"] == "done":
            best = Path(lines[0]["folder"])
            kept = [p for p in best.iterdir() if p.name not in (CHECKPOINTS, LOCK)]
            shutil.rmtree(self.path / BEST, ignore_errors=True)
            with atomic.new_folder(self.path / BEST) as new:
                for path in kept:
                    copy = shutil.copytree if path.is_dir() else shutil.copy2
                    copy(path, new / path.name)
        return Sweep(self.path, lines, metric, self.path / PLOT if is_drawn else None)
