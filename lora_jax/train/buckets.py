"""Batch schedules: length buckets, and an order that is a pure function of the seed."""

import abc
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.train.examples import MAX_FAULTS

BUCKETS = 4
BUCKET_MULTIPLE = 8

Batch = dict[str, np.ndarray]


def length_buckets(
    lengths: Sequence[int], count: int = BUCKETS, *, longest: int | None = None
) -> list[int]:
    """Chooses up to ``count`` lengths to pad to that minimise padding.

    Args:
      lengths: lengths of the examples, in tokens.
      count: maximum number of buckets.
      longest: maximum bucket length, e.g. a model's context length.

    Returns:
      Increasing multiples of 8 (of more for very long texts); the last fits the longest
      example and does not exceed ``longest``.

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
    # cost[j]: padded tokens for the examples up to edge j, with the buckets so far.
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
    return [min(bucket, longest or bucket) for bucket in buckets[::-1]]


class Schedule(abc.ABC):
    """Batches of a fixed number of rows, each a pure function of the step number.

    Rows are grouped into buckets by length; rows left over in a bucket move to the next
    longer one. Subclasses define the arrays of a batch.

    Attributes:
      batch_size: rows per batch.
      buckets: the padded lengths.
      lengths: ``[n]`` length of each row in tokens.
      steps_per_epoch: ``ceil(n / batch_size)``.
      seed: seed of the shuffling.
      shuffle: False keeps the order within each bucket, for evaluation.
      adapters: ``[n]`` number of each row's adapter, if the examples have one.

    Args:
      lengths: length of each row in tokens, at least 1.
      batch_size: rows per batch.
      buckets: increasing lengths to pad to; `length_buckets` if None.
      seed: seed of the shuffling.
      shuffle: whether to shuffle rows and batches, differently in each epoch.

    Raises:
      ValueError: if there are no rows, one is empty or longer than the last bucket, or
        an argument is out of range.
    """

    adapters: np.ndarray | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        buckets: Sequence[int] | None,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        if not len(lengths):
            raise ValueError(f"{type(self).__name__} needs at least 1 example; got 0.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed must be at least 0; got {seed}.")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.lengths = np.array(lengths)
        if not self.lengths.all():
            empty = np.flatnonzero(self.lengths == 0)[:MAX_FAULTS].tolist()
            raise ValueError(
                f"every example must have at least 1 token; those at {empty} have 0."
            )
        self.buckets = _check_buckets(
            length_buckets(self.lengths.tolist()) if buckets is None else buckets,
            self.lengths,
        )
        self.steps_per_epoch = -(-len(self.lengths) // batch_size)
        self._plan: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.lengths)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yields the ``steps_per_epoch`` batches of an epoch, with each row once."""
        first = number * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            yield self.batch_at(step)

    def batch_at(self, step: int, rows: Any = slice(None)) -> Batch:
        """Returns the batch of a step, counted over all epochs from 0.

        ``rows`` indexes the rows to build.
        """
        length, members = self._planned(step)
        wanted = np.arange(self.batch_size)[rows]
        return self._pad(length, members[wanted[wanted < len(members)]], len(wanted))

    def shapes_at(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a step's batch, building at most one of its rows."""
        length, members = self._planned(step)
        row = self._pad(length, members[:1], 1)
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in row.items()
        }

    def length_at(self, step: int) -> int:
        """Returns the padded length of the batch of a step."""
        return self._planned(step)[0]

    def indices_at(self, step: int) -> np.ndarray:
        """Returns the ``[<= batch_size]`` rows in the batch of a step, in order.

        They are example indices unless packed; the rest of the batch is filler.
        """
        return self._planned(step)[1]

    def adapters_at(self, step: int) -> np.ndarray:
        """Returns the numbers of the adapters with rows in the batch of a step."""
        assert self.adapters is not None  # asked only where there are some
        return np.unique(self.adapters[self.indices_at(step)])

    def identity(self) -> dict[str, Any]:
        """Returns everything the batches depend on, as JSON values."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        self._add_contents(digest)
        return {
            "examples": len(self),
            "batch_size": self.batch_size,
            "buckets": self.buckets,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "digest": digest.hexdigest()[:16],
        }

    def _planned(self, step: int) -> tuple[int, np.ndarray]:
        """Returns (padded length, rows) of a step's batch."""
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}.")
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._plan_epoch(epoch))
        return self._plan[1][index]

    def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns (padded length, rows) of each batch of an epoch."""
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

    @abc.abstractmethod
    def _pad(self, length: int, members: np.ndarray, count: int) -> Batch:
        """Builds these rows, padded to a length, followed by filler up to a count."""

    @abc.abstractmethod
    def _add_contents(self, digest: Any) -> None:
        """Adds the contents of the rows to a hash."""


def pad_ids(
    texts: Sequence[Any], length: int, count: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and mask ``[count, length]`` int32: texts, then filler.

    Filler attends to one token, so that no mean over tokens is 0/0.
    """
    ids = np.full((count, length), pad_id, np.int32)
    mask = np.zeros((count, length), np.int32)
    mask[len(texts) :, 0] = 1
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def row_weights(real: int, count: int) -> np.ndarray:
    """Returns the weights ``[count]`` of a batch's rows: 1, and 0 for filler."""
    return (np.arange(count) < real).astype(np.float32)


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
