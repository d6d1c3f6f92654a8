"""Batches of few shapes, in an order that is a pure function.

The order of a whole run follows from the lengths, the seed and the epoch alone. So the
position in the data is the step number, and a resumed run sees what the uninterrupted
one would have seen.

Examples are grouped by length into buckets and padded to the bucket's length: as many
shapes, and compilations, as buckets. What is left over in a bucket moves up to the next
longer one, so an epoch is ``ceil(n / batch_size)`` batches and only the last can hold
filler rows (weight 0).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.train.examples import MAX_FAULTS
from lora_jax.train.examples import encode_labels as encode_labels
from lora_jax.train.examples import label_vocabulary as label_vocabulary
from lora_jax.train.examples import read_jsonl as read_jsonl

BUCKETS = 4
BUCKET_MULTIPLE = 8

Batch = dict[str, np.ndarray]


def length_buckets(lengths: Sequence[int], count: int = BUCKETS) -> list[int]:
    """Chooses the lengths to pad to: the ``count`` that leave the least padding.

    Args:
      lengths: of the examples, in tokens.
      count: the largest number of buckets.

    Returns:
      Increasing multiples of 8 (of more for very long texts); the last holds the
      longest example.

    Raises:
      ValueError: if there are no lengths, one is below 1, or ``count`` is below 1.

    Example:
      >>> length_buckets([5, 6, 7, 30, 31, 100], count=2)
      [32, 104]
    """
    if not len(lengths) or min(lengths) < 1 or count < 1:
        raise ValueError(
            "length_buckets needs at least 1 length, all at least 1, and count >= 1; "
            f"got {len(lengths)} lengths, the least {min(lengths, default=None)}, "
            f"and count = {count}."
        )
    step = -(-max(lengths) // (128 * BUCKET_MULTIPLE)) * BUCKET_MULTIPLE
    edges, number = np.unique(
        -(-np.asarray(lengths) // step) * step, return_counts=True
    )
    below = np.concatenate([[0], np.cumsum(number)])
    # cost[j]: padded tokens of the first j edges' examples in the buckets so far.
    cost, choice = edges * below[1:], []
    for _ in range(min(count, len(edges)) - 1):
        before = np.concatenate([[0], cost])
        grid = before[None, :] + edges[:, None] * (below[1:, None] - below[None, :])
        grid = np.where(np.tri(len(edges), len(before), dtype=bool), grid, np.inf)
        choice.append(grid.argmin(axis=1))
        cost = grid.min(axis=1)
    buckets, j = [], len(edges)
    for picks in reversed(choice):
        if j == 0:
            break
        buckets.append(int(edges[j - 1]))
        j = int(picks[j - 1])
    if j:
        buckets.append(int(edges[j - 1]))
    return buckets[::-1]


class Batches:
    """Batches of tokenised examples, each a pure function of the step number.

    A batch is a dictionary of NumPy arrays: ``input_ids`` and ``attention_mask``
    ``[b, t]`` int32, ``weights`` ``[b]`` float32 (0 for filler rows) and, if the
    examples have a ``label``, ``labels`` ``[b]`` (int32, or float32 for regression).
    ``b`` is always ``batch_size``, ``t`` one of ``buckets``.

    Attributes:
      batch_size: rows of every batch.
      buckets: the lengths padded to.
      lengths: ``[n]`` tokens of each example.
      steps_per_epoch: ``ceil(n / batch_size)``.

    Args:
      examples: mappings with ``input_ids`` (a sequence of integers) and, in all or
        none, ``label`` (a class number or a float).
      batch_size: rows of every batch.
      buckets: increasing lengths to pad to; `length_buckets` chooses if None.
      seed: of the order.
      shuffle: False keeps the order within each bucket: for evaluation.
      pad_id: the token that fills up rows.

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
        if not len(examples):
            raise ValueError("Batches needs at least 1 example; got 0.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed must be at least 0; got {seed}.")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.pad_id = pad_id
        self._ids = [np.asarray(e["input_ids"], np.int32) for e in examples]
        self.lengths = np.array([len(ids) for ids in self._ids])
        self._labels = _label_array(examples)
        if not self.lengths.all():
            empty = np.flatnonzero(self.lengths == 0)[:MAX_FAULTS].tolist()
            raise ValueError(
                f"every example must have at least 1 token; those at {empty} have 0."
            )
        self.buckets = _check_buckets(
            length_buckets(self.lengths.tolist()) if buckets is None else buckets,
            self.lengths,
        )
        self.steps_per_epoch = -(-len(self._ids) // batch_size)
        self._plan: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self._ids)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yields the batches of one epoch.

        Args:
          number: of the epoch, from 0.

        Yields:
          ``steps_per_epoch`` batches that hold each example once.
        """
        first = number * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            yield self.batch_at(step)

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a step, counted over all epochs from 0.

        Args:
          step: at least 0.

        Returns:
          The batch.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}.")
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._plan_epoch(epoch))
        return self._pad(*self._plan[1][index])

    def indices_at(self, step: int) -> np.ndarray:
        """Returns which examples the batch of a step holds, in the order of its rows.

        Args:
          step: at least 0.

        Returns:
          ``[<= batch_size]`` places in ``examples``; the rows after them are filler.
        """
        self.batch_at(step)
        return self._plan[1][step % self.steps_per_epoch][1]

    def identity(self) -> dict[str, Any]:
        """Returns what the order depends on, as JSON: equal means equal batches."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for ids in self._ids:
            digest.update(ids.astype("<i4").tobytes())
        if self._labels is not None:
            digest.update(self._labels.tobytes())
        return {
            "examples": len(self),
            "batch_size": self.batch_size,
            "buckets": self.buckets,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "digest": digest.hexdigest()[:16],
        }

    def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns (padded length, examples) of each batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self))
        if self.shuffle:
            rng.shuffle(order)
        bucket_of = np.searchsorted(self.buckets, self.lengths[order])
        plan, rest = [], order[:0]
        for bucket, length in enumerate(self.buckets):
            members = np.concatenate([rest, order[bucket_of == bucket]])
            full = len(members) // self.batch_size * self.batch_size
            plan += [(length, m) for m in members[:full].reshape(-1, self.batch_size)]
            rest = members[full:]
        if len(rest):
            needed = np.searchsorted(self.buckets, self.lengths[rest].max())
            plan.append((self.buckets[needed], rest))
        if self.shuffle:
            plan = [plan[i] for i in rng.permutation(len(plan))]
        return plan

    def _pad(self, length: int, members: np.ndarray) -> Batch:
        shape = (self.batch_size, length)
        ids, mask = np.full(shape, self.pad_id, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(self.batch_size, np.float32)
        weights[: len(members)] = 1
        for row, member in enumerate(members):
            ids[row, : self.lengths[member]] = self._ids[member]
            mask[row, : self.lengths[member]] = 1
        mask[len(members) :, 0] = 1  # filler attends to something: no 0/0 in a mean
        batch = {"input_ids": ids, "attention_mask": mask, "weights": weights}
        if self._labels is not None:
            batch["labels"] = np.zeros(self.batch_size, self._labels.dtype)
            batch["labels"][: len(members)] = self._labels[members]
        return batch


def _label_array(examples: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    labelled = sum("label" in example for example in examples)
    if labelled not in (0, len(examples)):
        raise ValueError(
            f"all examples must have a label, or none; got {labelled} of "
            f"{len(examples)}."
        )
    if not labelled:
        return None
    labels = np.asarray([example["label"] for example in examples])
    if labels.dtype.kind not in "iuf" or labels.ndim != 1:
        raise TypeError(
            "labels of Batches must be class numbers or floats; got "
            f"{labels.dtype}. `encode_labels` makes numbers of names."
        )
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)


def _check_buckets(buckets: Sequence[int], lengths: np.ndarray) -> list[int]:
    buckets = list(buckets)
    if not buckets or buckets[0] < 1 or sorted(set(buckets)) != buckets:
        raise ValueError(
            f"buckets must be increasing lengths, at least one; got {buckets}."
        )
    if (longest := int(lengths.max())) > buckets[-1]:
        raise ValueError(
            f"the longest example has {longest} tokens, above the last bucket, "
            f"{buckets[-1]}. Truncate examples to it, or add a bucket of {longest}."
        )
    return buckets
