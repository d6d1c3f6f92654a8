"""What settings stand for: a model with adapters, tokenised splits, a loss.

Every command that touches a model builds it here, so that `train`, `plan`, `eval`,
`encode` and `merge` mean the same thing by the same words.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.array_types import PyTree
from lora_jax.cli.console import UserError
from lora_jax.cli.settings import DataSettings, RunSettings, TrainSettings
from lora_jax.io.vader import load_vader
from lora_jax.models.load import HEAD, LoadedModel
from lora_jax.models.pretrained import load_model
from lora_jax.names import DROPOUT, PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.train.data import (
    Batches,
    encode_labels,
    label_vocabulary,
    length_buckets,
    read_jsonl,
)
from lora_jax.train.losses import softmax_cross_entropy
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.step import LossFn
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.targets import Target

SPLITS = ("train", "validation", "test")
EVAL_ROWS = 32

Rows = list[dict[str, Any]]


@dataclasses.dataclass
class Job:
    """A model with adapters, ready to train.

    Attributes:
      settings: where it came from.
      loaded: the base.
      adapted: the base with LoRA.
      targets: its adapted layers.
      variables: the three collections, adapters fresh.
      labels: the classes; a class is its place in the list.
      fingerprint: of the frozen base.
    """

    settings: RunSettings
    loaded: LoadedModel
    adapted: Adapted
    targets: list[Target]
    variables: dict[str, PyTree]
    labels: list[str | int]
    fingerprint: str


class Split(NamedTuple):
    """A tokenised split.

    Attributes:
      examples: ``{"input_ids", "label"}`` each.
      truncated: how many texts were cut to ``max_length``.
    """

    examples: Rows
    truncated: int


def read_splits(data: DataSettings) -> dict[str, Rows]:
    """Reads every split that the settings name, texts and labels as they are.

    Args:
      data: the settings.

    Returns:
      ``{"train": [{"text", "label"}, ...], "validation": ..., "test": ...}``; ``test``
      is left out where there is none.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: naming file, line and reason of each malformed line.
    """
    if data.dataset is not None:
        return load_vader(data.dataset, seed=data.seed)._asdict()
    files = {name: getattr(data, name) for name in SPLITS}
    return {name: read_jsonl(file) for name, file in files.items() if file is not None}


def class_names(splits: Mapping[str, Rows]) -> list[str | int]:
    """Returns the classes of the training split; the other splits must know no more."""
    try:
        labels = label_vocabulary([row["label"] for row in splits["train"]])
    except TypeError as error:  # a fault of the file, not of a caller
        raise UserError(str(error)) from error
    for name, rows in splits.items():
        encode_labels([row["label"] for row in rows], labels, source=name)
    return labels


def build(settings: RunSettings, labels: list[str | int]) -> Job:
    """Loads the base and puts fresh adapters and a fresh head on it.

    Args:
      settings: of the run.
      labels: the classes.

    Returns:
      The job.

    Raises:
      ValueError: if the model can't be read, or the adapters don't fit it.
    """
    head_key, lora_key = jax.random.split(jax.random.key(settings.train.seed))
    loaded = load_model(
        settings.model.path,
        num_labels=len(labels),
        pooling=settings.model.pooling,
        dtype=jnp.dtype(settings.model.dtype),
        key=head_key,
    )
    adapted = adapt(loaded.module, settings.lora)
    variables = adapted.attach(loaded.params, lora_key)
    if HEAD not in variables.get(PARAMS, {}):
        raise UserError(
            f"lora.train must name the head, {HEAD!r}: a new head that is not trained "
            f"only guesses; got {list(settings.lora.train)}."
        )
    return Job(
        settings=settings,
        loaded=loaded,
        adapted=adapted,
        targets=adapted.targets(loaded.params),
        variables=variables,
        labels=labels,
        fingerprint=fingerprint(variables["frozen"]),
    )


def tokenize(job: Job, rows: Rows, *, source: str) -> Split:
    """Tokenises a split and numbers its labels.

    Args:
      job: the model, with its tokenizer and classes.
      rows: ``{"text", "label"}`` each.
      source: what to call the rows in an error.

    Returns:
      The split.

    Raises:
      ValueError: if the model has no tokenizer, or a label is not among the classes.
    """
    labels = encode_labels([row["label"] for row in rows], job.labels, source=source)
    encoded = encode_texts(
        job.loaded,
        [row["text"] for row in rows],
        max_length=job.settings.data.max_length,
    )
    examples = [
        {"input_ids": ids, "label": int(label)}
        for ids, label in zip(encoded.ids, labels, strict=True)
    ]
    return Split(examples, encoded.truncated)


def encode_texts(
    loaded: LoadedModel, texts: list[str], *, max_length: int | None
) -> Any:
    """Returns token ids of texts, cut to what the model and the settings allow."""
    if loaded.tokenizer is None:
        raise UserError(
            f"{loaded.path} must hold a tokenizer.json to read text; it has none."
        )
    longest = loaded.config.max_positions
    return loaded.tokenizer.encode(
        texts, max_length=min(max_length or longest, longest)
    )


def training_batches(job: Job, split: Split) -> Batches:
    """Returns the shuffled batches of a training split."""
    train = job.settings.train
    return Batches(split.examples, train.batch_size, seed=train.seed)


def eval_batches(split: Split, buckets: Sequence[int] = ()) -> Batches:
    """Returns the batches of an evaluation, in order.

    Args:
      split: the examples.
      buckets: lengths to pad to, such as those of training, so that all splits share
        what is compiled; one more is added where an example is longer.

    Returns:
      The batches; `Batches.epoch` of 0 holds each example once.
    """
    lengths = [len(example["input_ids"]) for example in split.examples]
    buckets = list(buckets) or length_buckets(lengths)
    if max(lengths) > buckets[-1]:
        buckets.append(length_buckets(lengths, 1)[0])
    return Batches(split.examples, EVAL_ROWS, buckets, shuffle=False)


def one_epoch(batches: Batches) -> Iterator[dict[str, np.ndarray]]:
    """Yields each example of evaluation batches once."""
    return batches.epoch(0)


def optimizer(train: TrainSettings, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that the settings describe."""
    return lora_optimizer(
        train.learning_rate,
        total_steps=total_steps,
        warmup_steps=round(train.warmup * total_steps),
        schedule=train.schedule,
        clip_norm=train.clip_norm,
        weight_decay=train.weight_decay,
        lora_b_ratio=train.lora_b_ratio,
    )


def total_steps(train: TrainSettings, steps_per_epoch: int) -> int:
    """Returns how many steps a run has."""
    steps = train.epochs * steps_per_epoch
    return steps if train.max_steps is None else min(steps, train.max_steps)


def classification_loss(module: Any, *, label_smoothing: float = 0.0) -> LossFn:
    """Returns ``(variables, batch, rngs) -> (loss_sum, weight, {"accuracy": hits})``.

    Args:
      module: called as ``module.apply(variables, input_ids, attention_mask)``.
      label_smoothing: see `softmax_cross_entropy`.

    Returns:
      The loss function; it is deterministic where ``rngs`` is empty.
    """

    def loss_fn(variables, batch, rngs):
        logits = module.apply(
            variables,
            batch["input_ids"],
            batch["attention_mask"],
            deterministic=DROPOUT not in rngs,
            rngs=rngs,
        )
        labels, weights = batch["labels"], batch["weights"]
        loss, weight = softmax_cross_entropy(
            logits, labels, weights=weights, label_smoothing=label_smoothing
        )
        hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels))
        return loss, weight, {"accuracy": hits}

    return loss_fn


def sentence_vectors(job: Job, batches: Batches, on_batch=lambda n: None) -> np.ndarray:
    """Returns what the frozen base hands to its head, ``[n, d]``, in example order."""
    headless = job.loaded.module.clone(num_labels=None)
    params = {k: v for k, v in job.loaded.params.items() if k != HEAD}
    pool = jax.jit(lambda p, ids, mask: headless.apply({"params": p}, ids, mask))
    out = np.zeros((len(batches), job.loaded.config.hidden_size), np.float32)
    for step, batch in enumerate(one_epoch(batches)):
        members = batches.indices_at(step)
        vectors = pool(params, batch["input_ids"], batch["attention_mask"])
        out[members] = np.asarray(vectors)[: len(members)]
        on_batch(step + 1)
    return out
