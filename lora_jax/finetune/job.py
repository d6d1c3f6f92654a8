"""`Job`, the base class of the tasks that `tasks.open_job` chooses from."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import Adapter, load_adapter
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.formatting import metric_text
from lora_jax.finetune.mixed_evaluation import measure_each
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.sections import DataSettings, TrainSettings
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.texts import max_tokens
from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import with_new_head
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.source import Source
from lora_jax.models.stacking import can_scan
from lora_jax.models.target_names import translate_names
from lora_jax.models.tokens import localize
from lora_jax.names import FROZEN
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.train.buckets import Schedule, length_buckets
from lora_jax.train.loop import evaluate
from lora_jax.train.mixed import make_mixed_eval_step
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.step import LossFn, make_eval_step
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.targets import Target

SPLITS = ("train", "validation", "test")
EVAL_ROWS = 32

Metrics = Mapping[str, float]
EvalStep = Callable[[PyTree, Any], dict[str, Any]]
Facts = list[tuple[str, str]]


class Split(NamedTuple):
    """A tokenised split.

    Attributes:
      examples: the examples for the job's batches.
      truncated: number of examples truncated to ``max_length``.
      dropped: number of examples dropped because truncation removed all their targets.
    """

    examples: list[dict[str, Any]]
    truncated: int
    dropped: int = 0


@dataclasses.dataclass
class Job(abc.ABC):
    """A model with adapters, and its examples, ready to train.

    Attributes:
      settings: the settings it was built from.
      devices: the devices for weights and batches.
      lora: the adapter config, resolved for this model.
      loaded: the base model.
      adapted: the base with LoRA.
      targets: its adapted layers.
      variables: the three collections, with new adapters.
      splits: the tokenised examples.
      adapters: names of the adapters, if the examples name theirs; ``variables`` are
        then those of each at the start.
    """

    settings: RunSettings
    devices: Devices
    lora: LoRAConfig
    loaded: LoadedModel
    adapted: Adapted
    targets: list[Target]
    variables: dict[str, PyTree]
    splits: dict[str, Split]
    adapters: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    unit: ClassVar[str]  # the unit of a batch, for messages
    weight: ClassVar[str]  # the unit the loss is averaged over
    metrics: ClassVar[tuple[str, ...]]  # validation metrics; the last selects the best
    best_mode: ClassVar[str]  # "max" or "min"
    default_length: ClassVar[int]  # data.max_length, unless it is given
    has_formula: ClassVar[bool] = True  # of its FLOPs, where a decoder's has one

    @abc.abstractmethod
    def loss(self, module: Any, *, is_training: bool, copies: int = 1) -> LossFn:
        """Returns the loss function of ``module``, the base or the adapted model.

        Args:
          module: the model.
          is_training: whether to smooth labels.
          copies: how many of it `jax.vmap` computes at once; they share the memory
            that is set aside for logits.
        """

    @property
    def eval_rows(self) -> int:
        """The rows of a batch of an evaluation."""
        return self.devices.rows(min(EVAL_ROWS, self.settings.train.batch_size))

    def eval_step(self, module: Any, *, copies: int = 1) -> EvalStep:
        """Returns the compiled evaluation of ``module``, for `measure`; see `loss`."""
        if not self.adapters:
            return make_eval_step(self.loss(module, is_training=False, copies=copies))
        loss_fn = self.loss(module, is_training=False, copies=self.eval_rows)
        return make_mixed_eval_step(loss_fn)

    def measure(
        self, step: EvalStep, variables: PyTree, batches: Iterable[Any]
    ) -> dict[str, Any]:
        """Returns the metrics over batches, and their total ``weight``.

        If the examples name their adapter, `measure_each` does; ``variables`` have all.
        """
        if self.adapters:
            return measure_each(step, variables, batches, self.adapters, self.metrics)
        return evaluate(step, variables, batches)

    @property
    def max_length(self) -> int:
        """Maximum tokens per example; of an encoder–decoder, of each of its sides."""
        return max_tokens(self.settings.data, self.loaded, self.default_length)[0]

    def lengths(self, split: Split) -> list[int]:
        """Returns the tokens of each example that buckets are chosen for."""
        return [len(example["input_ids"]) for example in split.examples]

    def buckets(self, split: Split, known: Sequence[int] = ()) -> list[int] | None:
        """Returns lengths to pad a split to: ``known`` and one more if needed."""
        lengths = self.lengths(split)
        own = length_buckets(lengths, longest=self.loaded.config.max_positions)
        if not known:
            return own
        return [*known, own[-1]] if max(lengths) > known[-1] else [*known]

    @abc.abstractmethod
    def schedule(
        self, split: Split, rows: int, buckets: list[int] | None, **order: Any
    ) -> Schedule:
        """Returns batches of ``rows`` examples; ``order`` is a seed or no shuffling."""

    def batches(self) -> Schedule:
        """Returns the shuffled batches of the training split."""
        train, split = self.settings.train, self.splits["train"]
        buckets = self.buckets(split)
        return self.schedule(split, train.batch_size, buckets, seed=train.seed)

    def evaluation(self, split: Split, buckets: Sequence[int] = ()) -> Schedule:
        """Returns batches of a split in order; epoch 0 contains each example once.

        Args:
          split: the examples.
          buckets: lengths to pad to, e.g. those of training, so that splits share
            compilations; one more is added if an example is longer.
        """
        own = self.buckets(split, buckets)
        return self.schedule(split, self.eval_rows, own, shuffle=False)

    @abc.abstractmethod
    def tokenize_file(self, path: str) -> Split:
        """Reads and tokenises a file of examples."""

    def baseline(self, splits: Mapping[str, Split], out: Reporter) -> dict[str, Any]:
        """Evaluates the frozen base on ``validation`` and, if present, ``test``.

        Returns:
          ``validation_<metric>``, ``test_<metric>`` (None without a test split) of the
          metric that selects the best step, and any further facts.
        """
        one = dataclasses.replace(self, adapters=())  # there is only one base
        step, variables = one.eval_step(self.loaded.module), self.loaded.variables
        measured = {name: s for name, s in splits.items() if name != "train"}
        found = {
            name: one.measure(step, variables, stream)[self.metric]
            for name, _, stream in self.streams(measured, "base", out)
        }
        results = {f"{k}_{self.metric}": found.get(k) for k in SPLITS[1:]}
        return {**results, "what": "frozen base"}

    @abc.abstractmethod
    def data_facts(self, batches: Schedule) -> Facts:
        """Describes the examples."""

    @abc.abstractmethod
    def extra(self) -> dict[str, Any]:
        """Returns JSON values to save with an adapter, for use without settings."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """The frozen base's fingerprint; if sharded, all processes must call this."""
        return fingerprint(self.variables[FROZEN])

    def load_adapter(self, folder: Path) -> Adapter:
        """Loads an adapter; raises unless it is one of this base and these layers."""
        mark = self.fingerprint
        return load_adapter(folder, expected=self.variables, fingerprint=mark)

    def with_settings(self, settings: RunSettings) -> "Job":
        """Returns the job that ``settings`` describe, over the base of this one.

        Args:
          settings: with the model and data of this job; adapters and seed may differ.

        Returns:
          A job with new adapters; base and examples are shared.
        """
        head_key, _ = jax.random.split(jax.random.key(settings.train.seed))
        loaded = with_new_head(self.loaded, head_key)
        fields = attach(settings, self.devices, loaded, self.lora_for(settings))
        other = dataclasses.replace(self, **fields)
        other.fingerprint = self.fingerprint
        return other

    @property
    def frozen_notes(self) -> list[str]:
        """Lines about weights that stay frozen; see `Adapted.frozen_notes`."""
        return self.adapted.frozen_notes(self.loaded.params)

    def lora_for(self, settings: RunSettings) -> LoRAConfig:
        """Returns the adapter config of other settings, resolved for this model."""
        lora = localize(settings.lora, self.loaded)
        if not lora.train:  # of an encoder it is the head
            lora = dataclasses.replace(lora, train=self.lora.train)
        return lora

    @property
    def metric(self) -> str:
        """The metric that selects the best step."""
        return self.metrics[-1]

    @property
    def sizes(self) -> str:
        """The number of examples of each split, as text."""
        return ", ".join(f"{k} {len(s.examples):,}" for k, s in self.splits.items())

    def describe(self, metrics: Metrics) -> str:
        """Formats an evaluation's metrics."""
        return "  ".join(
            f"{name} {metric_text(name, metrics[name])}" for name in self.metrics
        )

    def set_remat(self, remat: str) -> None:
        """Sets a decoder's rematerialisation policy."""
        module = self.loaded.module.clone(remat=remat)
        self.loaded = self.loaded._replace(module=module)
        self.adapted = adapt(module, self.lora, *self.loaded.inputs)

    def streams(
        self, splits: Mapping[str, Split], what: str, out: Reporter
    ) -> Iterator[tuple[str, Schedule, Iterator[Any]]]:
        """Iterates over splits, each example once, with one progress bar (``what``).

        Yields:
          A split's name, its schedule and its batches, to be exhausted before the next.
        """
        buckets, done = self.batches().buckets, 0
        found = {name: self.evaluation(s, buckets) for name, s in splits.items()}
        with out.progress(what, sum(s.steps_per_epoch for s in found.values())) as tick:
            for name, schedule in found.items():

                def show(number: int, note: str, before: int = done) -> None:
                    tick(before + number, note)

                yield name, schedule, self.devices.one_epoch(schedule, show)
                done += schedule.steps_per_epoch

    def is_better(self, new: float | None, old: float | None) -> bool:
        """Returns whether a metric value is better than another; NaN is the worst."""
        new, old = (math.nan if x is None else x for x in (new, old))  # JSON's null
        if not math.isfinite(old):
            return math.isfinite(new)
        return new > old if self.best_mode == "max" else new < old

    @property
    def prompt(self) -> Literal["text", "chat"] | None:
        """The kind of prompt the model continues; None if it doesn't generate."""
        return None

    def samples(self, variables: PyTree) -> list[dict[str, str]]:
        """Returns the model's continuations of ``train.samples``; empty by default."""
        del variables
        return []


def attach(
    settings: RunSettings, devices: Devices, loaded: LoadedModel, lora: LoRAConfig
) -> dict[str, Any]:
    """Adds new adapters to a base; returns the corresponding fields of `Job`."""
    _, key = jax.random.split(jax.random.key(settings.train.seed))
    lora = localize(lora, loaded)
    adapted = adapt(loaded.module, lora, *loaded.inputs)
    targets = adapted.targets(loaded.params)
    variables = adapted.attach(loaded.params, key)
    return {
        "settings": settings,
        "devices": devices,
        "loaded": loaded,
        "lora": lora,
        "adapted": adapted,
        "targets": targets,
        "variables": devices.place(variables, targets),
    }


def data_files(data: DataSettings, splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """Returns the files of splits; a held-out split is in the training file."""
    files = {name: getattr(data, name) for name in SPLITS}
    is_held_out = "validation" in splits and files["validation"] is None
    wanted = {*splits, "train"} if is_held_out else splits
    return {n: file for n, file in files.items() if n in wanted and file is not None}


def load(
    settings: RunSettings, devices: Devices, source: Source, **options: Any
) -> LoadedModel:
    """Loads a run's base in the dtypes of its settings, sharded over its devices.

    Args:
      settings: settings of the run.
      devices: its devices.
      source: the model on disk.
      **options: further ones of `load_model`.
    """
    model, kept = settings.model, settings.model.param_dtype
    if source.family.kind != "encoder":
        options["remat"] = model.first_remat(jax.default_backend())
    if source.family.kind == "decoder":
        lora = translate_names(settings.lora, source.family, source.config)
        scan = can_scan(lora, source.config) if model.scan is None else model.scan
        options["scan_layers"] = scan
    return load_model(
        model.path,
        sharding=devices.sharding,
        dtype=jnp.dtype(model.dtype),
        param_dtype=None if kept is None else jnp.dtype(kept),
        **options,
    )


def optimizer(train: TrainSettings, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that the settings describe."""
    return lora_optimizer(**optimizer_options(train, total_steps))


def optimizer_options(train: TrainSettings, total_steps: int) -> dict[str, Any]:
    """Returns the arguments of `lora_optimizer` that the settings describe."""
    return {
        "learning_rate": train.learning_rate,
        "total_steps": total_steps,
        "warmup_steps": round(train.warmup * total_steps),
        "schedule": train.schedule,
        "clip_norm": train.clip_norm,
        "weight_decay": train.weight_decay,
        "lora_b_ratio": train.lora_b_ratio,
    }


def total_steps(train: TrainSettings, steps_per_epoch: int) -> int:
    """Returns the number of steps of a run."""
    steps = train.epochs * steps_per_epoch
    return steps if train.max_steps is None else min(steps, train.max_steps)
