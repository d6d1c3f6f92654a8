"""Runs that share a compiled step: trained side by side, one after another in a slot.

A run is a `Session` as in `lora-jax train`, and its loop is the same: it asks for a
step and is sent the result. Only who takes the step differs: here all runs that wait
for one take it together. So early stopping, checkpoints, the best adapter, resuming and
the summary are those of a run of its own.
"""

import copy
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax.finetune import job as jobs
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.errors import DivergedError
from lora_jax.finetune.pricing import JobSteps, too_large
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.sweep_grid import Point, shared_config
from lora_jax.finetune.sweep_member import InSlot, Member
from lora_jax.finetune.tasks import open_job
from lora_jax.names import FIXED
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.plan.fit import largest_batch
from lora_jax.plan.step import StepPlan, price_step
from lora_jax.train.members import (
    Hyper,
    member_optimizer,
    members_evaluation,
    shared_adapter,
)
from lora_jax.train.slots import Members
from lora_jax.train.state import TrainState
from lora_jax.train.step import LossFn
from lora_jax.tree.targets import Target

MOST = 16  # runs side by side where nobody says how many
MOST_PLANNED = 64  # compiled to see whether they fit: a program grows with its runs
LEAST_GAIN = 0.95  # of the time one by one, to be worth it

OnEnd = Callable[[Member, dict[str, Any] | None, DivergedError | None], None]


class Group:
    """Runs over one base that share a compiled step.

    Attributes:
      points: the runs.
      out: where to report.
      job: that of the first run.
      targets: the adapted layers, at the largest ranks, with a scaling of 1.
      steps: prices of the job's steps.
      eval_step: shared by all runs.
      evaluation: that of all runs at once.
      baseline: the frozen base's metrics, once a run has measured them.
      plan: of the step.
      drops_apart: whether the runs differ in their dropout rate.
      choice: what was measured to choose how many train side by side.
      should_stop: whether Ctrl-C was pressed.

    Args:
      points: the runs.
      out: where to report.
      mesh: with an axis ``member``, or None for one device.
      should_stop: whether to stop.
      job: of the first run, if it is open already.
    """

    def __init__(
        self,
        points: Sequence[Point],
        out: Reporter,
        mesh: Mesh | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        job: jobs.Job | None = None,
    ) -> None:
        self.points, self.out, self.mesh = list(points), out, mesh
        self.should_stop = should_stop
        job = job or open_job(points[0].settings, devices=Devices())
        self.job = copy.copy(job)  # `_shared` may set its remat
        self.steps = JobSteps(self.job)
        self.batches = self.steps.batches
        self.baseline: dict[str, Any] | None = None
        self.plan: StepPlan
        self.choice = ""
        if len(self.batches.buckets) > 1:
            # Runs of one seed have batches of the same lengths at the same steps.
            self.points.sort(key=lambda point: point.settings.train.seed)
        base = self.job.loaded
        tables = [
            adapt(base.module, lora, *base.inputs).targets(base.params)
            for lora in {self.job.lora_for(point.settings) for point in self.points}
        ]
        rates = {point.settings.lora.dropout_rate for point in self.points}
        self.drops_apart = len(rates) > 1
        self.config = shared_config(self.job.lora, tables)
        if self.drops_apart:
            self.config = dataclasses.replace(self.config, dropout_rate=0.0)
        self._adapt()
        self._made: dict[tuple[int, str | None], Members] = {}
        self._plans: dict[tuple[int, str | None], StepPlan] = {}

    def hyper_of(self, job: jobs.Job, targets: Sequence[Target], total: int) -> Hyper:
        """Returns what is a run's own in the shared step; it takes ``total`` steps."""
        options = jobs.optimizer_options(job.settings.train, total)
        rate = job.settings.lora.dropout_rate if self.drops_apart else None
        hyper = Hyper.of(targets, **options, dropout_rate=rate)
        return hyper._replace(fixed=job.variables.get(FIXED))

    def _adapt(self) -> None:
        base = self.job.loaded
        self.adapted: Adapted = adapt(base.module, self.config, *base.inputs)
        self.targets: list[Target] = self.adapted.targets(base.params)
        self.eval_step = self.job.eval_step(self.adapted)

    def _shared(
        self, remat: str | None, count: int
    ) -> tuple[LossFn, TrainState, Hyper]:
        """Returns the shared module's loss, and a state and numbers for its shapes."""
        job, train = self.job, self.job.settings.train
        if remat is not None and remat != getattr(job.loaded.module, "remat", None):
            job.set_remat(remat)
            self._adapt()
        hyper = self.hyper_of(job, self.targets, self.steps.total)
        own = shared_adapter(job.variables, hyper, self.targets)
        hyper = hyper._replace(fixed=own.get(FIXED))
        state = TrainState.create(
            {**job.variables, **own},
            member_optimizer(hyper),
            jax.random.key(train.seed),
        )
        loss_fn = job.loss(self.adapted, is_training=True, copies=count)
        return loss_fn, state, hyper

    def members(self, count: int, remat: str | None) -> Members:
        """Returns so many slots; made once."""
        if (count, remat) not in self._made:
            loss_fn, state, hyper = self._shared(remat, count)
            accumulate = self.job.settings.train.accumulate
            made = Members(loss_fn, accumulate, state, hyper, count, self.mesh)
            self._made[count, remat] = made
        return self._made[count, remat]

    def price(self, count: int, remat: str | None) -> StepPlan:
        """Compiles the step of so many runs; says what it needs."""
        self._stop_if_asked()
        if (count, remat) not in self._plans:
            members, limit = self.members(count, remat), self.steps.limit
            shapes = members.shapes(self.steps.longest)
            self._plans[count, remat] = price_step(
                members, members.state, shapes, limit=limit, remat=remat
            )
        return self._plans[count, remat]

    def plan_most(self, together: int, remat: str | None) -> tuple[StepPlan, int]:
        """Prices a step from shapes alone, and finds the most runs that fit.

        Args:
          together: how many runs to price.
          remat: a decoder's remat policy.

        Returns:
          The plan for so many runs, and the largest number that fits the device, of
          no more than `MOST_PLANNED`, or ``together`` if that is more.
        """
        rows, _ = self.steps.longest["input_ids"].shape
        loss_fn, state, hyper = self._shared(remat, together)
        here = state.step.sharding
        own, hyper = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            (state.changing, hyper),
        )
        state = TrainState(frozen=state.frozen, **own)

        ceiling = max(MOST_PLANNED, together)

        @functools.cache
        def price(count: int) -> StepPlan:
            accumulate = self.job.settings.train.accumulate
            members = Members(loss_fn, accumulate, state, hyper, count)
            batch, limit = members.shapes(self.steps.longest), self.steps.limit
            return price_step(members, members.state, batch, limit=limit, remat=remat)

        most = largest_batch(lambda wanted: price(min(wanted // rows, ceiling)), rows)
        return price(together), most.batch // rows if most else 0

    def choose(self, together: int | None = None) -> int:
        """Chooses how many runs are trained side by side, and compiles their step.

        As many as fit the device, if asked for; else as many as make the sweep faster
        than one run after another, by the clock.

        Args:
          together: how many; None to choose.

        Returns:
          ``m``.

        Raises:
          UserError: if not even one fits, or not as many as asked for.
          KeyboardInterrupt: if Ctrl-C was pressed, after the program at hand.
        """
        total = len(self.points)
        wanted = self._even(min(together or self._most(), total))
        count, remat = self._largest(wanted, exactly=together is not None)
        if together is not None or count == 1 or self.mesh is not None:
            return self._settle(count, remat)
        one = self._seconds(1, remat)
        tried = [f"of one run {1e3 * one:,.0f} ms"]
        while count > 1:
            many = self._seconds(count, remat)
            tried.append(f"of {count} {1e3 * many:,.0f} ms")
            if -(-total // count) * many < LEAST_GAIN * total * one:
                break
            count = self._even(count // 2)
        self.choice = f"measured here, a step takes: {', '.join(tried)}"
        return self._settle(count, remat)

    def _most(self) -> int:
        """How many to try: of one seed, where others have batches of other lengths."""
        if len(self.batches.buckets) == 1 or self.mesh is not None:
            return MOST
        seeds = [point.settings.train.seed for point in self.points]
        return min(MOST, max(map(seeds.count, seeds)))

    def _even(self, count: int) -> int:
        """Returns no more than ``count``, so that the last round is about as full."""
        parts = 1 if self.mesh is None else self.mesh.size
        rounds = -(-len(self.points) // count)
        even = -(-len(self.points) // rounds)
        return -(-even // parts) * parts

    def _largest(self, count: int, *, exactly: bool) -> tuple[int, str | None]:
        """Finds the largest number of runs up to ``count`` that fits, and the remat."""
        parts = 1 if self.mesh is None else self.mesh.size
        for remat in self.steps.policies:
            number = count
            while number >= parts:
                self.plan = self.price(number, remat)
                if self.plan.fits and exactly and number < count:
                    suggestion = f"At most {number} of them fit: --together {number}."
                    self.plan = self.price(count, remat)
                    raise too_large(self.plan, "this machine", suggestion)
                if self.plan.fits:
                    return number, remat
                number = number // 2 // parts * parts
        raise too_large(self.plan, "this machine", self.steps.suggestion(self.plan))

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise KeyboardInterrupt

    def _settle(self, count: int, remat: str | None) -> int:
        self.slots = self.members(count, remat)
        self._made = {(count, remat): self.slots}
        step = self.job.eval_step(self.adapted, copies=count)
        self.evaluation = members_evaluation(step)
        self.plan = self.price(count, remat)
        return count

    def _seconds(self, count: int, remat: str | None) -> float:
        """Times a step, by the fastest of three; on states that no run has."""
        self._stop_if_asked()
        members, batch = self.members(count, remat), self.batches.batch_at(0)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(members.step(dict.fromkeys(range(count), batch)))
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def train(self, points: Sequence[Point], count: int, on_end: OnEnd) -> None:
        """Trains runs, ``count`` at a time.

        Args:
          points: those of the group that haven't ended.
          count: from `choose`.
          on_end: called with each run that ended, and its summary or why it diverged.

        Raises:
          KeyboardInterrupt: once all runs under way have saved a checkpoint.
        """
        keeps_phase = count > 1 and self._keeps_phase()
        queue = deque(point for point in self.points if point in points)
        running: dict[int, Member] = {}
        total, done, estimate = len(queue), 0, self.steps.total * len(queue)

        def advance(slot: int, member: Member, taken: Any) -> None:
            """Sends a run the step it waited for; frees its slot after the last."""
            try:
                member.number, state = member.loop.send(taken)
                if taken is None:
                    self.slots.put(slot, state, member.hyper)
                return
            except StopIteration as end:
                on_end(member, end.value, None)
            except DivergedError as error:
                on_end(member, None, error)
            except KeyboardInterrupt:
                if not member.is_stopped:
                    raise
            running.pop(slot).folder.release()

        try:
            with self.out.progress("sweep", estimate) as tick:
                while True:
                    for slot in range(count):
                        while slot not in running and queue and not self.should_stop():
                            running[slot] = member = Member(queue.popleft(), self)
                            advance(slot, member, None)
                    if not running:
                        break
                    chosen = self._next(running, keeps_phase=keeps_phase)
                    metrics = self.slots.step(
                        {s: m.batches.batch_at(m.number) for s, m in chosen.items()}
                    )
                    if keeps_phase:
                        self._validate(chosen)
                    for slot, member in chosen.items():
                        read = functools.partial(self.slots.get, slot, member.like)
                        advance(slot, member, (InSlot(read), metrics[slot]))
                    done += len(chosen)
                    left = len(queue) + len(running)
                    note = f"{total - left} of {total} runs have ended"
                    tick(min(done, estimate), note, quiet=not left)
        finally:
            for member in running.values():
                member.loop.close()
                member.folder.release()
        if queue or self.should_stop():
            raise KeyboardInterrupt

    def _keeps_phase(self) -> bool:
        """Whether the runs validate at the same steps, and so all at once.

        Those that stop early don't: the next in the slot would have to wait.
        """
        trains = [point.settings.train for point in self.points]
        plans = {(t.eval_every, t.epochs, t.max_steps, t.patience) for t in trains}
        is_one_length = len(self.batches.buckets) == 1
        is_one_order = is_one_length or len({t.seed for t in trains}) == 1
        return len(plans) == 1 and trains[0].patience is None and is_one_order

    def _validate(self, chosen: dict[int, Member]) -> None:
        """Evaluates the runs that validate after this step, in one program.

        Always in that of all slots, so that a run's bits don't depend on the others.
        """
        due = {slot: member for slot, member in chosen.items() if member.is_due}
        if not due:
            return
        first = next(iter(due.values()))
        with first.timed("evaluate"):
            stream = self.job.devices.one_epoch(first.evaluations["validation"])
            sums = self.slots.evaluate(self.evaluation, stream)
            for slot, member in due.items():
                member.validated = self.job.measure(_of_slot, slot, sums)

    def _next(
        self, running: dict[int, Member], *, keeps_phase: bool = False
    ) -> dict[int, Member]:
        """Chooses the runs that step: most whose batches are of one length.

        Runs that keep their phase wait after a validation until all have had theirs.
        """
        if keeps_phase:
            between = {s: m for s, m in running.items() if m.number % m.eval_every}
            running = between or running
        found: dict[int, dict[int, Member]] = {}
        for slot, member in running.items():
            length = member.batches.length_at(member.number)
            found.setdefault(length, {})[slot] = member
        return max(found.values(), key=lambda group: (len(group), -_behind(group)))


def _of_slot(slot: int, sums: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[slot] for name, found in sums.items()}


def _behind(group: dict[int, Member]) -> int:
    return min(member.number for member in group.values())
