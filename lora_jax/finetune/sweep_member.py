"""A run of a sweep: a `Session` whose steps, and some evaluations, others take."""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax.finetune import job as jobs
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import RunFolder
from lora_jax.finetune.session import Session
from lora_jax.finetune.start import with_start
from lora_jax.finetune.sweep_grid import Point
from lora_jax.train.members import shared_adapter
from lora_jax.train.state import TrainState

if TYPE_CHECKING:
    from lora_jax.finetune.sweep_group import Group


class Member(Session):
    """One run of a group.

    Attributes:
      point: its settings in the grid.
      number: the step it waits for.
      like: its initial state.
      hyper: its inputs of the shared step.
      loop: yields the steps it needs.
      validated: metrics of the step that it is about to validate, if others ran too.
    """

    def __init__(self, point: Point, group: "Group") -> None:
        super().__init__(
            point.settings, RunFolder(point.settings.output.dir), group.out
        )
        self.point, self.group = point, group
        self.validated: dict[str, float] | None = None
        self.out = Reporter()  # the group speaks for its runs
        self.stoppable = lambda out: contextlib.nullcontext(group.should_stop)
        is_started = self.folder.is_started()
        self.folder.check(self.settings, resume=is_started, overwrite=False)
        job = group.job.with_settings(self.settings)
        self.take(with_start(job, self.folder.path))
        train = self.settings.train
        key = jax.random.key(train.seed)
        tx = jobs.optimizer(train, self.total)
        self.state = self.like = TrainState.create(self.job.variables, tx, key)
        self.hyper = group.hyper_of(self.job, self.job.targets, self.total)
        self.plan = group.plan
        if not is_started:
            self.folder.create(self.settings, overwrite=False)
        self.loop, self.number = self.steps(), 0

    @property
    def is_due(self) -> bool:
        """Whether it validates after the step that it waits for."""
        done = self.number + 1
        return done % self.eval_every == 0 or done == self.total

    def _baseline(self) -> dict[str, Any] | None:
        """Takes over what another run has measured of the same base."""
        lines = self.folder.metrics()
        is_known = any(line["split"] == "baseline" for line in lines)
        if self.group.baseline and self.settings.train.baseline and not is_known:
            self.folder.log(self.group.baseline)
        found = super()._baseline()
        self.group.baseline = found or self.group.baseline
        return found

    def _evaluate(self, name: str, variables: Any) -> dict[str, float]:
        if name == "validation" and self.validated is not None:
            found, self.validated = self.validated, None
            return found
        own = shared_adapter(variables, self.hyper, self.group.targets)
        with self.timed("evaluate"):
            stream = self.job.devices.one_epoch(self.evaluations[name])
            return self.job.measure(self.group.eval_step, {**variables, **own}, stream)

    def _draw(self, *drawn: Any) -> None:
        """Draws nothing: of a sweep's runs only the best is drawn, once they ended."""


class InSlot:
    """The state of a run in a slot, read once it is looked at."""

    def __init__(self, read: Callable[[], TrainState]) -> None:
        self._read = functools.cache(read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read(), name)
