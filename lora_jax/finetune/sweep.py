"""`sweep`: a config and a grid of settings in; run folders and a table out."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.finetune.errors import (
    DivergedError,
    Interrupted,
    UserError,
    disk_fault,
)
from lora_jax.finetune.formatting import count_of, metric_text
from lora_jax.finetune.interrupt import interruptible
from lora_jax.finetune.reporter import Reporter
from lora_jax.names import DATA, MEMBER
from lora_jax.parallel.mesh import AXES, MORE_AXES

if TYPE_CHECKING:
    from lora_jax.finetune.settings import RunSettings
    from lora_jax.finetune.sweep_folder import SweepFolder
    from lora_jax.finetune.sweep_member import Member

RESUME = "sweep(config, grid, resume=True)"  # where no command line was given


class Sweep(NamedTuple):
    """A finished sweep.

    Attributes:
      path: its folder, with one folder per run and ``best/``, a copy of the best one.
      runs: the best first: each run's ``name``, its ``values`` by setting,
        ``validation`` and ``test`` metrics, ``folder``, and ``status``, ``"done"`` or
        ``"diverged"``.
      metric: the metric they are sorted by.
      plot: the metric against the learning rate, one line per rank; None without
        matplotlib.
    """

    path: Path
    runs: list[dict[str, Any]]
    metric: str
    plot: Path | None


def sweep(
    config: "str | os.PathLike[str] | Mapping[str, Any] | RunSettings",
    grid: Mapping[str, Iterable[Any]] | Sequence[str],
    *,
    zipped: bool = False,
    together: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Sweep:
    """Fine-tunes all combinations of a grid's settings; what `lora-jax sweep` does.

    Runs train side by side in one compiled step over one frozen base, each with its own
    learning rate and schedule, rank, alpha, dropout, weight decay, seed, order of the
    data, early stopping and best adapter. Each gives what `fine_tune` gives, up to
    the order of float32 sums: 1e-5 of a leaf's largest value, more only where a run is
    so unsteady (high rates) that changing the last bits of its base would move it as
    much. Runs that differ in what a step is compiled for, such as the batch size or the
    targets, train after one another. Only the best run's curves are drawn, in
    ``best/``.

    Args:
      config: of all runs, as for `fine_tune`; ``output.dir`` is the sweep's folder.
      grid: values by setting, ``{"train.learning_rate": [1e-4, 1e-3]}``, or the words
        of the command, ``["train.learning_rate=1e-4,1e-3", "seed=0..2"]``.
      zipped: combines the n-th values of each setting instead of all combinations.
      together: number of runs that train side by side; None measures which is fastest.
      resume: whether to continue the sweep in the folder.
      overwrite: whether to delete a sweep in the folder first.
      reporter: shows progress; None is silent.

    Returns:
      The finished sweep.

    Raises:
      FileNotFoundError: if a file or the model is missing.
      ValueError: naming every fault of the grid and of the settings.
      UserError: if the folder is in use, a setting can't be swept, or even a single run
        doesn't fit the device.
      Interrupted: a `KeyboardInterrupt` that says how to resume.
    """
    from lora_jax.finetune.mixed_data import names_adapters
    from lora_jax.finetune.sweep_folder import SweepFolder
    from lora_jax.finetune.sweep_grid import expand, groups
    from lora_jax.finetune.sweep_group import Group
    from lora_jax.finetune.sweep_job import check_adapters, check_sources, opened

    out = reporter or Reporter()
    if out.resume == Reporter.resume:
        out.resume = RESUME
    if resume and overwrite:
        raise ValueError("resume and overwrite must not both be set; choose one.")
    if together is not None and together < 1:
        raise ValueError(f"together must be at least 1; got {together}.")
    if jax.process_count() > 1:
        raise UserError("a sweep is one process; start it without --distributed.")
    points = expand(config, grid, zipped=zipped)
    if any(names_adapters(point.settings.data) for point in points):
        raise UserError(
            "the runs of a sweep have one adapter each, and the examples name theirs: "
            "`lora-jax train` trains all of them in one run."
        )
    sorted_, differing = groups(points)
    mesh = _member_mesh(points[0].settings, min(map(len, sorted_)))
    folder = SweepFolder(points[0].settings.output.dir, points)
    with contextlib.ExitStack() as stack:
        folder.check(resume=resume, overwrite=overwrite)
        open_points = [point for point in points if point.name not in folder.lines]
        check_sources(open_points)
        out.heading(f"A sweep of {count_of(points)}")
        if differing:
            shown = ", ".join(differing)
            out.say(
                f"  {len(sorted_)} steps, one after another: they differ in {shown}"
            )
        stop = stack.enter_context(interruptible(out))
        stack.callback(folder.release)
        stack.enter_context(_explained(folder, out))
        job = None
        for number, group in enumerate(sorted_):
            left = [point for point in group if point.name not in folder.lines]
            if not left:
                continue
            is_first, job = job is None, opened(group[0].settings, job)
            if is_first:
                check_adapters(open_points, job)
            runs = Group(group, out, mesh, stop, job)
            count = runs.choose(folder.together.get(str(number), together))
            folder.open(number, count, overwrite=overwrite)
            why = f" ({runs.choice})" * bool(runs.choice)
            out.say(f"  {count_of(left)}, {count} side by side{why}")

            def on_end(
                member: "Member",
                summary: dict[str, Any] | None,
                error: DivergedError | None,
                metric: str = runs.job.metric,
            ) -> None:
                line = folder.add(member.point, metric, summary, error)
                found = line["validation"] or {}
                shown = metric_text(metric, found.get(metric))
                said = "diverged" if error else f"validation {metric} {shown}"
                out.say(f"  {member.point.name}: {said}")

            runs.train(left, count, on_end)
        return Sweep(*folder.finish())


@contextlib.contextmanager
def _explained(folder: "SweepFolder", out: Reporter) -> Iterator[None]:
    """Adds to what ends a sweep early how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        message = f"interrupted. {folder.how_to_resume(out.resume)}"
        raise Interrupted(message, is_orderly=True) from None
    except (OSError, UserError) as error:
        fault = disk_fault(error, folder.path)
        if fault is None and getattr(error, "code", None) != 1:
            raise
        message = f"{fault or error}\n{folder.how_to_resume(out.resume)}"
        raise UserError(message, code=1) from error


def _member_mesh(settings: "RunSettings", runs: int) -> Mesh | None:
    """Returns the mesh that splits runs over devices, or None for one device."""
    own, devices = settings.mesh, jax.devices()
    wanted = own.member
    if own.member == 1 and own.data == -1:
        wanted = min(len(devices), runs)  # what is left, as for a run's data axis
    sizes = {key: getattr(own, key) for key in (*AXES, *MORE_AXES)}
    if own.data == -1:
        sizes[DATA] = 1
    if wrong := [f"mesh.{key} = {n}" for key, n in sizes.items() if n != 1]:
        shown = ", ".join(wrong)
        raise UserError(
            "a sweep splits its runs over the devices, mesh.member of them, and no run "
            f"over several: all other sizes of the mesh must be 1; got {shown}."
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
