"""A session of a training run, from reading the data to the summary."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_jax.files.adapter import save_adapter
from lora_jax.files.checkpoint import Checkpoints
from lora_jax.finetune import job as jobs
from lora_jax.finetune import report, verdict
from lora_jax.finetune.curves import draw_curves
from lora_jax.finetune.devices import check_batch
from lora_jax.finetune.errors import DivergedError
from lora_jax.finetune.formatting import duration, metric_text
from lora_jax.finetune.interrupt import Clock, Relay, interruptible
from lora_jax.finetune.pricing import JobSteps
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run_folder import ADAPTER, CHECKPOINTS, CURVES, FREE, RunFolder
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.start import keep_start, with_start
from lora_jax.finetune.tasks import open_job
from lora_jax.models.added_tokens import write_tokenizer
from lora_jax.parallel.processes import check_same, from_first, is_any, is_job
from lora_jax.train.buckets import Schedule
from lora_jax.train.loop import Fitted, Progress, Steps, fitting, take_steps
from lora_jax.train.state import TrainState

MARGIN = 4_000_000  # bytes for metrics, curves, summary and file-system blocks


class Session:
    """A new or resumed run: `prepare`, then `train`.

    Attributes:
      settings: settings of the run.
      folder: the run folder.
      out: where to report.
      seconds: seconds spent on each phase so far.
      best: the line of the best validation so far.
      last: the line of the last validation.
      stale: number of validations since the best.
      is_stopped: whether Ctrl-C stopped it gracefully.
      checkpoints: the checkpoints, once they are open.
    """

    def __init__(self, settings: RunSettings, folder: RunFolder, out: Reporter):
        self.settings, self.folder, self.out = settings, folder, out
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.stale = 0
        self.is_stopped = False
        self.checkpoints: Checkpoints | None = None
        self.stoppable = interruptible

    def how_to_resume(self) -> str:
        """Describes what is saved and how to resume."""
        step = self.checkpoints.latest_step() if self.checkpoints else None
        command = self.out.resume
        if step is not None:
            return f"The checkpoint of step {step} is saved. Resume with\n  {command}"
        if self.folder.is_started():
            return f"No checkpoint was written yet. Start from step 0 with\n  {command}"
        return "Nothing was written yet; start it again."

    def prepare(self) -> None:
        """Reads data and model and compiles the step, without using the run folder.

        Raises:
          UserError: if the step doesn't fit the device; suggests what does.
        """
        with self.timed("load"):
            self.take(with_start(open_job(self.settings), self.folder.path))
        check_batch(self.settings, self.job.devices)
        data = [self.job.fingerprint, self.batches.identity()]
        check_same("the base and the data", data)
        report.print_loaded(self.out, self.job, self.batches)
        with self.timed("compile"):
            found = JobSteps(self.job, self.batches).compile(self.out)
        self.step, self.state, self.plan = found
        steps = f"{self.total} of {self.settings.train.batch_size} {self.job.unit}"
        steps += f"; validation every {self.eval_every}"
        report.print_plan(self.out, self.job, self.plan, self.counts, steps)

    def take(self, job: jobs.Job) -> None:
        """Makes a job this run's own, and counts its steps and parameters."""
        self.job, self.batches = job, job.batches()
        train, per_epoch = self.settings.train, self.batches.steps_per_epoch
        self.total = jobs.total_steps(train, per_epoch)
        half = max(1, -(-per_epoch // 2))
        self.eval_every = min(train.eval_every or half, self.total)
        self.counts = report.counts(job)

    def train(self) -> dict[str, Any]:
        """Trains, evaluates, and writes the results."""
        feed = self.job.devices.feed(self.batches)
        return take_steps(self.steps(), self.step, feed, self.total)

    def steps(self) -> Steps[dict[str, Any]]:
        """Trains as `train` does, by steps that its driver takes; see `fitting`."""
        job, train, state = self.job, self.settings.train, self.state
        del self.state  # training consumes it
        keep_start(job, self.folder.path)
        self.eval_step = job.eval_step(job.adapted)
        self.evaluations = {
            name: job.evaluation(split, self.batches.buckets)
            for name, split in job.splits.items()
            if name != "train"
        }
        weights = report.tree_bytes((state.trainable, state.opt_state))
        self.folder.check_space((train.keep + 2) * weights + MARGIN)

        with self._open_checkpoints() as self.checkpoints:
            state = self._restore(state)
            baseline = self._baseline()
            is_over = self.is_out_of_patience()  # resumed after stopping early
            fitted = Fitted(state, True) if is_over else (yield from self._fit(state))
            if fitted.is_stopped and not self.is_out_of_patience():
                self.is_stopped = True
                raise KeyboardInterrupt
            return self._finish(fitted.state, baseline)

    def _open_checkpoints(self) -> Checkpoints:
        config = {
            section: {k: v for k, v in values.items() if f"{section}.{k}" not in FREE}
            for section, values in self.settings.to_dict().items()
        }
        return Checkpoints(
            self.folder / CHECKPOINTS,
            config=config,
            fingerprint=self.job.fingerprint,
            data=self.batches.identity(),
            free=FREE,
            keep=self.settings.train.keep,
            best_metric=self.job.metric,
            best_mode=self.job.best_mode,
        )

    def _restore(self, state: TrainState) -> TrainState:
        """Restores the last checkpoint, if there is one."""
        assert self.checkpoints is not None  # opened just before
        if self.checkpoints.latest_step() is not None:
            logger = logging.getLogger("lora_jax")
            handler = Relay(self.out)
            logger.addHandler(handler)
            try:
                state = self.checkpoints.restore(state)
            finally:
                logger.removeHandler(handler)
            self.out.heading(f"Resuming at step {int(state.step)} of {self.total}")
        check_same("the last checkpoint", int(state.step))
        for line in from_first(self.folder.rewind(int(state.step))):
            if line["split"] == "validation":
                self._is_best(line)
        return state

    def _baseline(self) -> dict[str, Any] | None:
        """Evaluates the frozen base, once per run."""
        for line in from_first(self.folder.metrics()):
            if line["split"] == "baseline":
                return line
        if not self.settings.train.baseline:
            return None
        self.out.heading("The frozen base")
        with self.timed("baseline"):
            result = self.job.baseline(self.job.splits, self.out)
        seconds = self.seconds["baseline"]
        line = {"step": 0, "split": "baseline", **result, "seconds": seconds}
        metric = self.job.metric
        shown = metric_text(metric, result[f"validation_{metric}"])
        self.out.say(
            f"  validation {metric} {shown}  ({result['what']}, {duration(seconds)})"
        )
        self.folder.log(line)
        return line

    def _fit(self, state: TrainState) -> Steps[Fitted]:
        first = int(state.step)
        self.out.heading("Training")
        clock = Clock(self.total, self.job.weight)
        save_every = self.settings.train.save_every or self.eval_every
        with (
            self.timed("train"),
            self.stoppable(self.out) as should_stop,
            self.out.progress("train", self.total) as tick,
        ):
            tick(first, "")

            def on_log(progress: Progress) -> None:
                clock.add(progress, first)
                tick(progress.step, clock.note)
                pace = progress.examples / progress.seconds
                self.folder.log(
                    {
                        "step": progress.step,
                        "split": "train",
                        **progress.metrics,
                        "skipped": progress.skipped,
                        f"{self.job.weight}_per_second": pace,
                        "seconds": self.elapsed(),
                    }
                )

            def on_save(state: TrainState) -> None:
                if int(state.step) % self.eval_every and int(state.step) != self.total:
                    self._save(state)  # otherwise saved by the validation

            fitted = yield from fitting(
                state,
                total_steps=self.total,
                log_every=self.settings.train.log_every,
                on_step=lambda number: tick(number, clock.note, quiet=True),
                on_log=on_log,
                every=[(self.eval_every, self._validate), (save_every, on_save)],
                should_stop=self._agreed(should_stop, first),
            )
            if fitted.is_stopped and self.checkpoints is not None:
                self._save(fitted.state)
                self.checkpoints.wait()
        if skipped := int(fitted.state.skipped):
            self.out.say(
                f"  {skipped} of {self.total} steps were skipped because their loss or "
                "gradient was not finite. A lower train.learning_rate helps.",
                style="yellow",
            )
        return fitted

    def _agreed(
        self, should_stop: Callable[[], bool], first: int
    ) -> Callable[[], bool]:
        """Returns a function, called after each step, that all processes agree on."""
        steps = itertools.count(first + 1)

        def is_over() -> bool:
            is_due = next(steps) % self.settings.train.log_every == 0 or not is_job()
            return self.is_out_of_patience() or (is_due and is_any(should_stop()))

        return is_over

    def _save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        assert self.checkpoints is not None  # open while training
        self.checkpoints.save(state, metrics)

    def _validate(self, state: TrainState) -> None:
        metrics = self._evaluate("validation", state.variables)
        line = {
            "step": int(state.step),
            "split": "validation",
            **{name: x for name, x in metrics.items() if name != "weight"},
            "seconds": self.elapsed(),
        }
        is_best = self._is_best(line)
        if is_best:
            self._save_adapter(state)
        self.folder.log(line)
        if not verdict.is_finite(line, self.job.metrics):
            raise self._diverged(state)
        self._save(state, {name: metrics[name] for name in self.job.metrics})
        self.out.say(
            f"  step {line['step']:>5}  validation {self.job.describe(metrics)}"
            + ("  (best so far)" if is_best else "")
        )
        for sample in self.job.samples(state.variables):
            self.folder.log({"step": line["step"], "split": "sample", **sample})
            self.out.say(f"    {sample['prompt']!r} -> {sample['text']!r}")
        if self.is_out_of_patience() and line["step"] < self.total:
            self.out.say(
                f"  no improvement for {self.stale} validations (train.patience): "
                "stopping early"
            )

    def _is_best(self, line: dict[str, Any]) -> bool:
        """Records a validation; returns whether it is the best so far."""
        metric, self.last = self.job.metric, line
        if not verdict.is_finite(line, self.job.metrics):
            return False
        if self.best is None or self.job.is_better(line[metric], self.best[metric]):
            self.best = line
            if not self.is_out_of_patience():  # else the run is already stopping
                self.stale = 0
            return True
        self.stale += 1
        return False

    def _diverged(self, state: TrainState) -> DivergedError:
        step, skipped = int(state.step), int(state.skipped)
        return verdict.diverged(
            self.job, step=step, skipped=skipped, best=self.best, last=self.last
        )

    def is_out_of_patience(self) -> bool:
        """Returns whether the last ``patience`` validations brought no improvement."""
        patience = self.settings.train.patience
        return patience is not None and self.stale >= patience

    def _save_adapter(self, state: TrainState) -> None:
        self._keep(self.folder / ADAPTER, state.variables, int(state.step))

    def _keep(self, place: Path, variables: Any, step: int, **facts: Any) -> None:
        """Saves an adapter with what is known of it."""
        job, loaded = self.job, self.job.loaded
        extra = {
            "model": self.settings.model.path,
            "param_dtype": self.settings.model.param_dtype,
            **job.extra(),
            **facts,
            "step": step,
        }
        save_adapter(place, variables, job.lora, job.fingerprint, extra=extra)
        if loaded.added and loaded.tokenizer and self.folder.is_writer:
            write_tokenizer(place, loaded.tokenizer, loaded.path)

    def _evaluate(self, name: str, variables: Any) -> dict[str, Any]:
        batches: Schedule = self.evaluations[name]
        with self.timed("evaluate"):
            stream = self.job.devices.one_epoch(batches)
            return self.job.measure(self.eval_step, variables, stream)

    def _finish(
        self, state: TrainState, baseline: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Evaluates the saved adapter and writes curves and summary."""
        job, best, last = self.job, self.best, self.last
        if best is None or last is None or 2 * int(state.skipped) > int(state.step):
            raise self._diverged(state)
        adapter = job.load_adapter(self.folder / ADAPTER)
        if adapter.extra["step"] != best["step"]:
            # Killed between saving an adapter and its checkpoint, and the repeated
            # steps had another result, e.g. on another mesh.
            assert self.checkpoints is not None  # open while training
            self._save_adapter(self.checkpoints.restore(state, step=best["step"]))
            adapter = job.load_adapter(self.folder / ADAPTER)
        variables = {**state.frozen, **adapter.variables}
        variables = job.devices.place(variables, job.targets)
        test = self._evaluate("test", variables) if "test" in job.splits else None
        warning = verdict.warning(job, best=best, last=last, baseline=baseline)
        return self._conclude(state, baseline, best, test=test, warning=warning)

    def _conclude(
        self,
        state: TrainState,
        baseline: dict[str, Any] | None,
        best: dict[str, Any],
        **results: Any,
    ) -> dict[str, Any]:
        """Writes curves and summary, and returns the latter."""
        if self.folder.is_writer:
            self._draw(best, baseline)
        self.seconds["total"] = self.elapsed()
        if results["warning"]:
            self.out.say(f"\n  {results['warning']}", style="yellow")
        summary = report.summarise(
            self.job,
            self.folder,
            state,
            best=best,
            baseline=baseline,
            parameters=self.counts,
            memory_bytes=self.plan.parts,
            seconds=self.seconds,
            **results,
        )
        self.folder.summarise(summary)
        return summary

    def _draw(self, best: dict[str, Any], baseline: dict[str, Any] | None) -> None:
        key = f"validation_{self.job.metric}"
        draw_curves(
            self.folder.metrics(),
            self.folder / CURVES,
            title=report.title(self.settings, self.counts),
            metrics=self.job.metrics,
            baseline=(baseline["what"], baseline[key]) if baseline else None,
            chosen=None if self.job.adapters else best["step"],  # each has its own
        )

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds a block's seconds to a phase, except those of phases inside it."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            spent = time.perf_counter() - start - inside
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
