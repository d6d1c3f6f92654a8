"""Checkpoints of a training run, which resumes from them bit for bit.

An Orbax checkpoint holds the trainable leaves, the optimizer state, the step (which is
also the position in the data), the PRNG key, the count of skipped steps, the run's
config and the base's fingerprint. It never holds a base array.

Leaves are copied to the host before `Checkpoints.save` returns, because the next step
donates their buffers; they are written in the background. Each leaf's CRC-32 is stored,
so that a damaged checkpoint is detected and the previous one is used.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lora_jax.files.arrays import host_leaves, leaf_summary, place
from lora_jax.parallel.processes import is_first, is_lost_peer, wait_for_all
from lora_jax.train.state import TrainState
from lora_jax.tree.paths import flatten

logger = logging.getLogger(__name__)

FORMAT = "lora_jax checkpoint"
VERSION = 1
DAMAGED = "damaged"


class Checkpoints:
    """The checkpoints of one run, in one directory: the last few and the best.

    A context manager: leaving it waits for the pending save, unless a process is lost.

    Args:
      directory: created if absent.
      config: the run's config as JSON values, which must be the same when resuming.
      fingerprint: of the frozen base, from `lora_jax.tree.fingerprint.fingerprint`.
      data: what the order of the data depends on, from `Batches.identity`.
      free: settings that may differ, as ``section.key``, even if a checkpoint's
        ``config`` contains them.
      keep: the number of latest checkpoints to keep.
      best_metric: name of the metric by which the best checkpoint is also kept; None
        keeps only the latest ones.
      best_mode: ``"min"`` or ``"max"``.

    Raises:
      OSError: if the directory can't be written.
      ValueError: if ``keep`` is below 1 or ``best_mode`` is invalid, or a step's
        bookkeeping is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        fingerprint: str,
        data: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "min",
    ) -> None:
        if keep < 1 or best_mode not in ("min", "max"):
            raise ValueError(
                "Checkpoints must have keep >= 1 and best_mode 'min' or 'max'; got "
                f"keep = {keep}, best_mode = {best_mode!r}."
            )
        import orbax.checkpoint as ocp  # slow to import

        self.directory = Path(directory).absolute()
        self._identity = {
            "config": _as_json(config),
            "fingerprint": fingerprint,
            "data": _as_json(data or {}),
        }
        self._free = {f"config/{name.replace('.', '/')}" for name in free}
        self._best_metric, self._best_mode = best_metric, best_mode
        self._args = ocp.args
        self._damaged: list[int] = []
        self._scores: dict[int, float] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LastAndBest(keep, self._scores),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )
        except OSError as error:
            raise OSError(
                f"checkpoints can't be written to {self.directory}: {error}. Choose a "
                "directory that exists or can be created, on a disk with free space."
            ) from error
        except Exception as error:  # Orbax reads every step's _CHECKPOINT_METADATA
            steps = sorted(p.name for p in self.directory.iterdir() if p.name.isdigit())
            raise ValueError(
                f"checkpoints in {self.directory} can't be opened: the file "
                f"_CHECKPOINT_METADATA of one of the steps {steps} is damaged: "
                f"{str(error)[:200]}. Move that step's folder away."
            ) from error
        for step in self.all_steps():
            with contextlib.suppress(_DamagedError):
                self._note(step, self._meta(step))

    def save(
        self, state: TrainState, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves a state; returns once it is copied to the host.

        Saving a step a second time has no effect.

        Args:
          state: the state after a step; its frozen part is ignored.
          metrics: validation metrics of this step, including ``best_metric`` if set.

        Raises:
          OSError: if this checkpoint, or the previous one, can't be written.
          ValueError: if ``best_metric`` is missing, or later steps were saved here.
        """
        step = int(state.step)
        self._set_damaged_aside()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(
                f"steps must be saved in order; got step {step} after step {latest} in "
                f"{self.directory}. Continue an older checkpoint in a new directory."
            )
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self._best_metric is not None and self._best_metric not in metrics:
                raise ValueError(
                    f"metrics must contain {self._best_metric!r}, which selects the "
                    f"best checkpoint; got {sorted(metrics)}."
                )
        leaves = host_leaves(state.changing)
        facts = {path: leaf_summary(leaf) for path, leaf in leaves.items()}
        meta = {
            "format": FORMAT,
            "version": VERSION,
            **self._identity,
            "metrics": metrics or {},
            "leaves": facts,
        }
        self._note(step, meta)
        size = sum(leaf.nbytes for leaf in leaves.values())
        with _writing(f"the checkpoint of step {step} ({size} bytes)", self.directory):
            if (free := shutil.disk_usage(self.directory).free) < size:
                raise OSError(f"only {free} bytes are free")
            self._manager.save(
                step,
                args=self._args.Composite(
                    state=self._args.StandardSave(leaves),
                    meta=self._args.JsonSave(meta),
                ),
            )

    def restore(self, state: TrainState, *, step: int | None = None) -> TrainState:
        """Restores the latest intact checkpoint, or that of one step.

        Args:
          state: a new state from `TrainState.create` for this run: provides shapes,
            types, devices and the frozen part.
          step: the step to restore; None for the latest, or if that is damaged (which
            is logged) the one before it.

        Returns:
          The state as it was saved, bit for bit.

        Raises:
          FileNotFoundError: if there is no checkpoint, or none of that step.
          ValueError: if config, base, data or shapes differ from this run's (gives
            both values of each difference), or no checkpoint is intact.
        """
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self.directory} must contain {wanted}; it has those of steps "
                f"{steps}."
            )
        faults = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return self._read(candidate, state)
            except _DamagedError as damage:
                faults.append(f"step {candidate}: {damage}")
                self._damaged.append(candidate)
                logger.warning(
                    "The checkpoint of step %d in %s is damaged (%s); using the one "
                    "before it.",
                    candidate,
                    self.directory,
                    damage,
                )
        raise ValueError(
            f"no checkpoint in {self.directory} is intact: {'; '.join(faults)}. Start "
            "a new run in a new directory."
        )

    def all_steps(self) -> list[int]:
        """Returns the steps of finished checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the last step saved, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the best ``best_metric``, or None."""
        return _best(self._scores, self.all_steps())

    def wait(self) -> None:
        """Waits until pending saves are on disk.

        Raises:
          OSError: if a checkpoint can't be written.
        """
        with _writing("a checkpoint", self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and ends Orbax's threads.

        Raises:
          OSError: if a checkpoint can't be written.
        """
        with _writing("a checkpoint", self.directory):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if is_lost_peer(error):
            self._manager.reload()  # the pending save would wait for the lost process
            return
        try:
            self.close()
        except OSError:
            if error is None:  # otherwise the first error is the one to report
                raise

    def _note(self, step: int, meta: Mapping[str, Any]) -> None:
        """Records a step's metric, negated if higher is better; NaN is ignored."""
        score = meta.get("metrics", {}).get(self._best_metric, math.nan)
        if math.isfinite(score):
            self._scores[step] = score if self._best_mode == "min" else -score

    def _read(self, step: int, state: TrainState) -> TrainState:
        args, meta = self._args, self._meta(step)
        here = host_leaves(state.changing, copy=False)
        self._check(step, meta, here)
        saved = self._restore(step, state=args.StandardRestore(here))
        for path, leaf in saved.items():
            if list(leaf_summary(leaf)) != list(meta["leaves"].get(path, ())):
                raise _DamagedError(f"{path} is not what was saved")
        return TrainState(frozen=state.frozen, **place(saved, state.changing))

    def _meta(self, step: int) -> dict[str, Any]:
        """Reads and checks a checkpoint's metadata."""
        meta = self._restore(step, meta=self._args.JsonRestore())
        if not _is_meta(meta):
            raise _DamagedError("its metadata is not that of a checkpoint")
        return meta

    def _restore(self, step: int, **item: Any) -> Any:
        try:
            composite = self._manager.restore(step, args=self._args.Composite(**item))
            return composite[next(iter(item))]
        except Exception as error:
            summary = str(error).splitlines()[0] if str(error) else repr(error)
            raise _DamagedError(summary[:300]) from error

    def _check(
        self, step: int, meta: Mapping[str, Any], here: Mapping[str, np.ndarray]
    ) -> None:
        """Raises if the checkpoint is from a different run."""
        pairs = [
            [
                flatten({part: value} if value else {part: {"": value}})
                for value in (mine, meta.get(part))
            ]
            for part, mine in self._identity.items()
        ]
        shapes = {path: leaf_summary(leaf)[:2] for path, leaf in here.items()}
        pairs.append([shapes, {p: facts[:2] for p, facts in meta["leaves"].items()}])
        faults = [
            f"{path} is {own.get(path, 'absent')!r} here, "
            f"{saved.get(path, 'absent')!r} in the checkpoint"
            for own, saved in pairs
            for path in sorted((own.keys() | saved.keys()) - self._free)
            if own.get(path) != saved.get(path)
        ]
        if faults:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} is from a "
                f"different run: {'; '.join(faults)}. Resume with its config, base and "
                "data, or choose a new directory."
            )

    def _set_damaged_aside(self) -> None:
        """Renames damaged checkpoints so that their steps can be saved again."""
        for step in self._damaged:
            folder = self.directory / str(step)
            if is_first() and folder.exists():
                aside, number = self.directory / f"{DAMAGED}-{step}", 1
                while aside.exists():
                    aside, number = aside.with_suffix(f".{number}"), number + 1
                folder.rename(aside)
        if self._damaged:
            wait_for_all("damaged checkpoints")
            self._damaged.clear()
            self._manager.reload()


class _LastAndBest:
    """Orbax preservation policy: the last ``keep`` checkpoints and the best."""

    def __init__(self, keep: int, scores: Mapping[int, float]) -> None:
        self.keep, self.scores = keep, scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], _best(self.scores, steps)}
        return [step in kept for step in steps]


class _DamagedError(Exception):
    """A checkpoint that can't be read back as it was written."""


@contextlib.contextmanager
def _writing(what: str, directory: Path) -> Iterator[None]:
    """Turns any exception raised by Orbax while writing into an `OSError`."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{what} can't be written to {directory}: {error}. Free some disk space "
            "and resume: earlier checkpoints are intact."
        ) from error


def _best(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
    scored = [(scores[step], step) for step in steps if step in scores]
    return min(scored)[1] if scored else None


def _is_meta(meta: Any) -> bool:
    """Returns whether JSON has the form that `Checkpoints.save` writes."""
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return False
    leaves, metrics = meta.get("leaves"), meta.get("metrics", {})
    return (
        isinstance(leaves, dict)
        and all(isinstance(facts, list) for facts in leaves.values())
        and isinstance(metrics, dict)
        and all(map(_is_metric, metrics.values()))
    )


def _is_metric(value: Any) -> bool:
    is_small = type(value) is int and abs(value) < 1 << 63  # a float holds it
    return type(value) is float or is_small


def _as_json(value: Any) -> Any:
    """Returns ``value`` as JSON would give it back: tuples become lists."""
    return json.loads(json.dumps(value))
