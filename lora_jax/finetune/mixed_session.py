"""A session of a run that trains several adapters: its examples name theirs.

Everything is as in a run with one adapter, but validated, kept and tested for each:
``adapters/NAME`` holds the adapter NAME at its own best validation.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.files.adapter import read_adapter_config
from lora_jax.finetune.formatting import listed
from lora_jax.finetune.mixed_evaluation import EACH, weighted_means
from lora_jax.finetune.run_folder import ADAPTERS
from lora_jax.finetune.session import Session
from lora_jax.names import OWNER
from lora_jax.train.state import TrainState

SHOWN = 12


class MixedSession(Session):
    """See `Session`.

    Attributes:
      bests: the metrics and step of each adapter's best validation so far.
      improved: the adapters whose last validation was their best.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bests: dict[str, dict[str, Any]] = {}
        self.improved: list[str] = []

    def place(self, name: str) -> Path:
        """Returns the folder of an adapter."""
        return self.folder / ADAPTERS / name

    def _restore(self, state: TrainState) -> TrainState:
        state = super()._restore(state)
        for name, best in [*self.bests.items()]:
            # Killed between saving an adapter and its checkpoint: the best before is
            # gone, and the repeated steps will bring the same best again.
            step = read_adapter_config(self.place(name))["extra"]["step"]
            if step != best["step"]:
                del self.bests[name]
        return state

    def _is_best(self, line: dict[str, Any]) -> bool:
        before, metric = self.stale, self.job.metric
        is_over = self.is_out_of_patience()
        super()._is_best(line)  # of all together, which the checkpoints go by
        self.improved = []
        for name, found in line[EACH].items():
            if any(x is None or not math.isfinite(x) for x in found.values()):
                continue
            best = self.bests.get(name)
            if best is None or self.job.is_better(found[metric], best[metric]):
                self.bests[name] = {"step": line["step"], **found}
                self.improved.append(name)
        if not is_over:
            self.stale = 0 if self.improved else before + 1
        return bool(self.improved)

    def _save_adapter(self, state: TrainState) -> None:
        each, step = self._each(state), int(state.step)
        for name in self.improved:
            self._keep(self.place(name), each[name], step, adapter=name)

    def _finish(
        self, state: TrainState, baseline: dict[str, Any] | None
    ) -> dict[str, Any]:
        job, last = self.job, self.last
        if not self.bests or last is None:
            raise self._diverged(state)
        variables = {**state.frozen, **self._kept(state)}
        test = self._evaluate("test", variables) if "test" in job.splits else None
        counts = self._examples()
        tested = {} if test is None else test[EACH]
        each = {
            name: {
                "validation": self.bests.get(name),
                "test": tested.get(name) if name in self.bests else None,
                "examples": {split: counts[split][i] for split in counts},
                "folder": str(self.place(name)),
            }
            for i, name in enumerate(job.adapters)
        }
        weights = np.array(counts["validation"])
        lost = dict.fromkeys(job.metrics, math.nan)
        known = {name: self.bests.get(name, lost) for name in each}
        best = {
            "step": max(own["step"] for own in self.bests.values()),
            **weighted_means(known, job.metrics, weights),
        }
        warning = None
        if missing := [name for name in each if name not in self.bests]:
            warning = (
                f"{len(missing)} of {len(each)} adapters diverged, and were not kept: "
                f"{listed(missing, SHOWN)}. Lower train.learning_rate."
            )
        return self._conclude(
            state, baseline, best, test=test, warning=warning, adapters=each
        )

    def _kept(self, state: TrainState) -> dict[str, Any]:
        """Returns the trained collections of all adapters, at their best."""
        each = self._each(state)
        for name in self.bests:
            each[name] = self.job.load_adapter(self.place(name)).variables
        return jax.tree.map(
            lambda like, *own: jax.device_put(np.stack(own), like.sharding),
            state.trainable,
            *each.values(),
        )

    def _each(self, state: TrainState) -> dict[str, Any]:
        """Returns each adapter's trained collections as they are."""
        trained = jax.device_get(state.trainable)
        return {
            name: jax.tree.map(lambda leaf, i=number: leaf[i], trained)
            for number, name in enumerate(self.job.adapters)
        }

    def _examples(self) -> dict[str, list[int]]:
        """Counts each adapter's examples in every split."""
        return {
            split: np.bincount(
                [example[OWNER] for example in found.examples],
                minlength=len(self.job.adapters),
            ).tolist()
            for split, found in self.job.splits.items()
        }
