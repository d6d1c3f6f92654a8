"""Batches with few distinct shapes, in a deterministic order.

The order of a whole run is a pure function of the lengths, the seed and the epoch. The
position in the data is therefore the step number, and a resumed run sees the same
batches as an uninterrupted one.

Examples are grouped by length into buckets and padded to the bucket's length, so there
are as many shapes, and compilations, as buckets. Examples left over in a bucket move up
to the next longer one, so an epoch is ``ceil(n / batch_size)`` batches and only the
last can contain filler rows (weight 0).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.names import OWNER
from lora_jax.train.buckets import Batch, Schedule, pad_ids, row_weights
from lora_jax.train.buckets import length_buckets as length_buckets
from lora_jax.train.examples import encode_labels as encode_labels
from lora_jax.train.examples import label_vocabulary as label_vocabulary
from lora_jax.train.examples import read_jsonl as read_jsonl
from lora_jax.train.packing import Example, fill_rows, plan_rows


class Batches(Schedule):
    """Batches of tokenised examples, each a pure function of the step number.

    A batch is a dictionary of NumPy arrays: ``input_ids`` and ``attention_mask``
    ``[b, t]`` int32, ``weights`` ``[b]`` float32 (0 for filler rows) and, if the
    examples have a ``label``, ``labels`` ``[b]`` (int32, or float32 for regression).
    ``b`` is always ``batch_size``, ``t`` one of ``buckets``. If the examples have an
    ``adapter``, so has each row ``[b]``, int32.

    Attributes:
      batch_size: rows per batch.
      buckets: the padded lengths.
      lengths: ``[n]`` length of each example in tokens.
      steps_per_epoch: ``ceil(n / batch_size)``.

    Args:
      examples: mappings with ``input_ids`` (a sequence of integers) and, in all or
        none, ``label`` (a class number or a float).
      batch_size: rows per batch.
      buckets: increasing lengths to pad to; `length_buckets` if None.
      seed: seed of the shuffling.
      shuffle: False keeps the order within each bucket, for evaluation.
      pad_id: the padding token.

    Raises:
      ValueError: if there are no examples, an example is empty or longer than the last
        bucket, only some have labels, or an argument is out of range.

    Example:
      >>> data = [{"input_ids": [7] * n, "label": n % 2} for n in (3, 9, 4)]
      >>> batches = Batches(data, batch_size=2, buckets=[4, 16], seed=0)
      >>> [batch["input_ids"].shape for batch in batches.epoch(0)]
      [(2, 16), (2, 4)]
      >>> batches.batch_at(2)["weights"].sum() + batches.batch_at(3)["weights"].sum()
      np.float32(3.0)
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        buckets: Sequence[int] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        pad_id: int = 0,
    ) -> None:
        self.pad_id = pad_id
        self._ids = [_as_ids(i, e) for i, e in enumerate(examples)]
        self._labels = _label_array(examples)
        self.adapters = _adapter_array(examples)
        lengths = [len(ids) for ids in self._ids]
        super().__init__(lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _add_contents(self, digest: Any) -> None:
        for ids in self._ids:
            digest.update(ids.astype("<i4").tobytes())
        if self._labels is not None:
            digest.update(self._labels.tobytes())
        if self.adapters is not None:
            digest.update(self.adapters.tobytes())

    def _pad(self, length: int, members: np.ndarray, count: int) -> Batch:
        texts = [self._ids[member] for member in members]
        ids, mask = pad_ids(texts, length, count, self.pad_id)
        weights = row_weights(len(members), count)
        batch = {"input_ids": ids, "attention_mask": mask, "weights": weights}
        if self._labels is not None:
            batch["labels"] = np.zeros(count, self._labels.dtype)
            batch["labels"][: len(members)] = self._labels[members]
        if self.adapters is not None:
            batch[OWNER] = _filled(self.adapters[members], count)
        return batch


class TextBatches(Schedule):
    """Batches for a causal language model, each a pure function of the step number.

    A batch has the arrays of `lora_jax.train.packing`: ``input_ids``, ``labels``
    (shifted), ``positions`` and ``segment_ids`` ``[b, t]`` int32, ``weights``
    ``[b, t]`` float32. Without ``packed_length`` a row is one example, padded to its
    bucket; with it, rows have that length and hold as many examples as fit. The
    grouping of examples into rows is the same in all epochs; the order of rows isn't.
    If the examples have an ``adapter``, so has each row ``[b]``, int32, and holds
    examples of that adapter only.

    Attributes:
      examples: number of examples; ``len()`` is the number of rows.
      targets: number of target tokens per epoch.
      token_fraction: fraction of an epoch's batches that is tokens, not padding.

    Args:
      examples: mappings with ``input_ids`` and ``loss_mask`` ``[n]``.
      batch_size: rows per batch.
      buckets: increasing lengths to pad to; `length_buckets` if None.
      packed_length: length of packed rows; None for one example per row.
      seed: seed of the shuffling.
      shuffle: False keeps the order within each bucket, for evaluation.
      pad_id: the padding token.

    Raises:
      ValueError: if there are no examples, one is empty, too long, or its two arrays
        differ in length; or an argument is out of range.

    Example:
      >>> ones = np.ones(9, np.int32)
      >>> data = [{"input_ids": ones[:n], "loss_mask": ones[:n]} for n in (3, 9, 4)]
      >>> batches = TextBatches(data, batch_size=2, packed_length=9)
      >>> batches.batch_at(0)["segment_ids"].max(axis=1).tolist(), len(batches)
      ([1, 2], 2)
      >>> f"{batches.token_fraction:.3f}"
      '0.889'
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        buckets: Sequence[int] | None = None,
        *,
        packed_length: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        pad_id: int = 0,
    ) -> None:
        if packed_length is not None and buckets is not None:
            raise ValueError(
                f"buckets = {list(buckets)} and packed_length = {packed_length} must "
                "not both be given: packed rows have one length."
            )
        self.pad_id, self.packed_length = pad_id, packed_length
        self._examples = [_as_arrays(i, e) for i, e in enumerate(examples)]
        self.examples, ids = len(self._examples), _adapter_array(examples)
        counts = [len(e["input_ids"]) for e in self._examples]
        self._rows = [[i] for i in range(self.examples)]
        if packed_length is not None:
            self._rows = _packed(counts, packed_length, ids)
            buckets = [packed_length]
        self.adapters = None if ids is None else ids[[row[0] for row in self._rows]]
        lengths = [sum(counts[i] for i in row) for row in self._rows]
        super().__init__(lengths, batch_size, buckets, seed=seed, shuffle=shuffle)
        self.targets = sum(int(e["loss_mask"][1:].sum()) for e in self._examples)
        places = sum(length for length, _ in self._plan_epoch(0)) * batch_size
        self.token_fraction = sum(counts) / places

    def _pad(self, length: int, members: np.ndarray, count: int) -> Batch:
        rows = [[self._examples[i] for i in self._rows[row]] for row in members]
        rows += [[]] * (count - len(rows))
        batch = fill_rows(rows, length, pad_id=self.pad_id)
        if self.adapters is not None:
            batch[OWNER] = _filled(self.adapters[members], count)
        return batch

    def _add_contents(self, digest: Any) -> None:
        if self.adapters is not None:
            digest.update(self.adapters.tobytes())
        for row in self._rows:
            digest.update(np.array([len(row), *row], "<i8").tobytes())
            for i in row:
                digest.update(self._examples[i]["input_ids"].astype("<i4").tobytes())
                digest.update(self._examples[i]["loss_mask"].astype("u1").tobytes())


def _as_ids(index: int, example: Mapping[str, Any]) -> np.ndarray:
    ids = np.asarray(example["input_ids"])
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"input_ids of an example must be integers; got {ids.dtype} at {index}."
        )
    return ids.astype(np.int32)


def _as_arrays(index: int, example: Example) -> dict[str, np.ndarray]:
    ids = _as_ids(index, example)
    mask = np.asarray(example["loss_mask"], np.uint8)
    if ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(
            "input_ids and loss_mask of an example must be [n]; got "
            f"{ids.shape} and {mask.shape} at {index}."
        )
    return {"input_ids": ids, "loss_mask": mask}


def _column(
    examples: Sequence[Mapping[str, Any]], key: str, what: str
) -> np.ndarray | None:
    """Returns one value of each example, or None if none has it."""
    having = sum(key in example for example in examples)
    if having not in (0, len(examples)):
        raise ValueError(
            f"all examples must have {what}, or none; got {having} of {len(examples)}."
        )
    return np.asarray([example[key] for example in examples]) if having else None


def _adapter_array(examples: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Returns the number of each example's adapter, or None if they have none."""
    found = _column(examples, OWNER, "an adapter")
    return None if found is None else found.astype(np.int32)


def _packed(
    counts: Sequence[int], length: int, adapters: np.ndarray | None
) -> list[list[int]]:
    """Packs examples into rows, each of one adapter."""
    if adapters is None:
        return plan_rows(counts, length)
    rows = []
    for adapter in np.unique(adapters):
        own = np.flatnonzero(adapters == adapter).tolist()
        found = plan_rows([counts[i] for i in own], length)
        rows += [[own[i] for i in row] for row in found]
    return rows


def _filled(adapters: np.ndarray, count: int) -> np.ndarray:
    """Gives filler rows, whose weight is 0, the adapter of the first row."""
    return np.concatenate([adapters, np.full(count - len(adapters), adapters[0])])


def _label_array(examples: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    labels = _column(examples, "label", "a label")
    if labels is None:
        return None
    if labels.dtype.kind not in "iuf" or labels.ndim != 1:
        raise TypeError(
            "labels of Batches must be class numbers or floats; got "
            f"{labels.dtype}. `encode_labels` turns names into numbers."
        )
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)
