"""The classification task: an encoder with a new head, labelled texts, accuracy."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from lora_jax.finetune.devices import Devices
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.held_out import hold_out
from lora_jax.finetune.job import (
    EVAL_ROWS,
    SPLITS,
    Facts,
    Job,
    Split,
    attach,
    data_files,
    load,
)
from lora_jax.finetune.mixed_data import line_adapters, read_adapters
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.texts import encode_texts, max_tokens
from lora_jax.models.source import Source
from lora_jax.names import CLASSIFIER, OWNER, PARAMS
from lora_jax.parallel.processes import fail_together
from lora_jax.train.buckets import Schedule
from lora_jax.train.classification import classification_loss
from lora_jax.train.data import Batches, encode_labels, label_vocabulary, read_jsonl
from lora_jax.train.probe import fit_probe, probe_accuracy
from lora_jax.train.step import LossFn

MAX_LENGTH = 128

Rows = list[dict[str, Any]]


@dataclasses.dataclass
class Classification(Job):
    """A `Job` with its classes, ``labels``, by index."""

    labels: list[str | int]

    unit: ClassVar[str] = "sentences"
    weight: ClassVar[str] = "examples"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    best_mode: ClassVar[str] = "max"
    default_length: ClassVar[int] = MAX_LENGTH

    def loss(self, module: Any, *, is_training: bool, copies: int = 1) -> LossFn:
        """Returns the cross-entropy loss, label-smoothed in training."""
        del copies
        smoothing = self.settings.train.label_smoothing if is_training else 0.0
        return classification_loss(module, label_smoothing=smoothing)

    @property
    def eval_rows(self) -> int:
        """See `Job.eval_rows`; without a backward pass there is room for more."""
        return self.devices.rows(EVAL_ROWS)

    def schedule(
        self, split: Split, rows: int, buckets: list[int] | None, **order: Any
    ) -> Schedule:
        """See `Job.schedule`."""
        return Batches(split.examples, rows, buckets, **order)

    def tokenize(self, rows: Rows, source: str) -> Split:
        """Tokenises rows and encodes labels; ``source`` names them in errors."""
        labels = encode_labels([r["label"] for r in rows], self.labels, source=source)
        texts = [row["text"] for row in rows]
        encoded = encode_texts(self.loaded, texts, max_length=self.max_length)
        examples = [
            {"input_ids": ids, "label": int(label)}
            for ids, label in zip(encoded.ids, labels, strict=True)
        ]
        if self.adapters:
            for example, row in zip(examples, rows, strict=True):
                example[OWNER] = row[OWNER]
        return Split(examples, encoded.truncated)

    def tokenize_file(self, path: str) -> Split:
        """See `Job.tokenize_file`."""
        rows = read_jsonl(path)
        if self.adapters:
            found = read_adapters({path: path}, self.adapters)
            _number(rows, found.lines[path])
        return self.tokenize(rows, path)

    def baseline(self, splits: Mapping[str, Split], out: Reporter) -> dict[str, Any]:
        """Fits a linear head on the frozen base's sentence vectors.

        Fits on ``train``, selects the L2 penalty on ``validation`` and scores ``test``
        once.
        """
        pairs = {}
        for name, schedule, stream in self.streams(splits, "encode", out):
            labels = np.array([e["label"] for e in splits[name].examples])
            pairs[name] = (self._sentence_vectors(schedule, stream), labels)
        vectors, labels = pairs["train"]
        probe = fit_probe(
            vectors, labels, pairs["validation"], num_labels=len(self.labels)
        )
        test = probe_accuracy(probe, *pairs["test"]) if "test" in pairs else None
        return {
            "validation_accuracy": probe.accuracy,
            "test_accuracy": test,
            "l2": probe.penalty,
            "what": "frozen base + linear head",
        }

    def _sentence_vectors(self, batches: Schedule, stream: Iterator[Any]) -> np.ndarray:
        """Returns the input of the frozen base's head, ``[n, d]``, in example order."""
        headless = self.loaded.module.clone(num_labels=None)
        params = {k: v for k, v in self.loaded.params.items() if k != CLASSIFIER}
        pool = jax.jit(
            lambda p, ids, mask: headless.apply({"params": p}, ids, mask),
            out_shardings=self.devices.everywhere,
        )
        out = np.zeros((len(batches), self.loaded.config.hidden_size), np.float32)
        for step, batch in enumerate(stream):
            members = batches.indices_at(step)
            vectors = pool(params, batch["input_ids"], batch["attention_mask"])
            out[members] = np.asarray(vectors)[: len(members)]
        return out

    def data_facts(self, batches: Schedule) -> Facts:
        """See `Job.data_facts`."""
        data, lengths = self.settings.data, batches.lengths
        share = np.mean([e["label"] == 0 for e in self.splits["train"].examples])
        padded = ", ".join(map(str, batches.buckets))
        tokens = f"mean {lengths.mean():.1f}, max {lengths.max()}, padded to {padded}"
        _, limit, lowered = max_tokens(data, self.loaded, MAX_LENGTH)
        if cut := sum(split.truncated for split in self.splits.values()):
            tokens += f"; {cut:,} texts truncated to {limit}"
        classes = f"{self.labels}; {self.labels[0]!r} is {share:.1%} of train"
        return [
            ("data", self.sizes),
            ("classes", classes),
            ("tokens", tokens),
            *lowered,
        ]

    def extra(self) -> dict[str, Any]:
        """See `Job.extra`."""
        return {
            "labels": self.labels,
            "pooling": self.settings.model.pooling,
            "max_length": self.settings.data.max_length or MAX_LENGTH,
        }


def open_classification(
    settings: RunSettings,
    devices: Devices,
    source: Source,
    *,
    splits: Sequence[str],
    extra: Mapping[str, Any],
) -> Classification:
    """Builds the job; see `open_job`. ``extra`` contains a trained run's classes."""
    if settings.data.packing or settings.train.samples:
        raise UserError(
            "data.packing and train.samples are for decoders, but the model in "
            f"{settings.model.path} is an encoder. Remove them."
        )
    key, _ = jax.random.split(jax.random.key(settings.train.seed))
    with fail_together():
        known = extra.get("labels")
        wanted = splits if known else SPLITS
        files = data_files(settings.data, wanted)
        rows = {name: read_jsonl(file) for name, file in files.items()}
        labels = known or class_names(rows)
        found = line_adapters(settings.data, wanted, extra.get("adapters", ()))
        for name in rows.keys() & found.lines.keys():
            _number(rows[name], found.lines[name])
        rows = hold_out(rows, settings.data, found.names, lambda row: row[OWNER])
        pooling = settings.model.pooling
        options = {"num_labels": len(labels), "pooling": pooling, "key": key}
        loaded = load(settings, devices, source, **options)
    lora = settings.lora
    if not lora.train:
        lora = dataclasses.replace(lora, train=(CLASSIFIER,))
    attached = attach(settings, devices, loaded, lora)
    if CLASSIFIER not in attached["variables"].get(PARAMS, {}):
        raise UserError(
            f"lora.train must include the head, {CLASSIFIER!r}: without training, a "
            f"new head is random; got {list(lora.train)}."
        )
    job = Classification(labels=labels, splits={}, adapters=found.names, **attached)
    wanted = [name for name in rows if name in splits]
    job.splits = {name: job.tokenize(rows[name], name) for name in wanted}
    return job


def _number(rows: Rows, adapters: Sequence[int]) -> None:
    """Replaces the name of each line's adapter by its number."""
    for row, number in zip(rows, adapters, strict=True):
        row[OWNER] = number


def class_names(splits: Mapping[str, Rows]) -> list[str | int]:
    """Returns the training file's classes; other files must not have any others."""
    try:
        labels = label_vocabulary([row["label"] for row in splits["train"]])
    except TypeError as error:  # the data is wrong, not the caller
        raise UserError(str(error)) from error
    for name, rows in splits.items():
        encode_labels([row["label"] for row in rows], labels, source=name)
    return labels
