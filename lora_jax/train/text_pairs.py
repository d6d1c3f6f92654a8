"""Training examples for embeddings: a text, one that belongs to it, maybe one that not.

The names are those of sentence-transformers: ``anchor`` (or ``query``), ``positive``
and ``negative``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.train.buckets import Batch, Schedule, pad_ids, row_weights
from lora_jax.train.examples import MAX_LINE, check_keys, read_jsonl

ANCHORS = ("anchor", "query")
POSITIVE, NEGATIVE = "positive", "negative"
FIELDS = (*ANCHORS, POSITIVE, NEGATIVE)
ARRAYS = {  # of a batch, by the texts' place in an example
    "queries": ("input_ids", "attention_mask"),
    "keys": ("positive_ids", "positive_mask"),
    "negatives": ("negative_ids", "negative_mask"),
}


def has_text_pairs(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file's first line has a field of `FIELDS`."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        for line in iter(lambda: file.readline(MAX_LINE), b""):
            if line.strip():
                break
        else:
            return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False  # whoever reads the file says so
    return isinstance(record, dict) and not record.keys().isdisjoint(FIELDS)


def read_text_pairs(path: str | os.PathLike[str]) -> list[tuple[str, ...]]:
    """Reads a JSONL file of texts that belong together, strictly.

    Args:
      path: lines are ``{"anchor", "positive"}`` or ``{"anchor", "positive",
        "negative"}``, all of them strings and all lines alike; ``query`` may stand for
        ``anchor``.

    Returns:
      Of each line the two or three texts.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: listing file, line and reason for each bad line, up to 20.
    """
    rows: list[tuple[str, ...]] = []

    def check(record: Mapping[str, Any]) -> str:
        check_keys(record, (), FIELDS)
        keys = sorted(record)
        given = [key for key in ANCHORS if key in record]
        if len(given) != 1 or POSITIVE not in record:
            return f"must have 'anchor' or 'query', and 'positive'; its keys are {keys}"
        for key in keys:
            if not isinstance(record[key], str) or not record[key].strip():
                return f"{key!r} must be a text that is not empty; got {record[key]!r}"[
                    :200
                ]
        wanted = (given[0], POSITIVE, NEGATIVE)
        row = tuple(record[key] for key in wanted if key in record)
        if rows and len(row) != len(rows[0]):
            first = "a" if len(rows[0]) == len(wanted) else "no"
            return f"must have {first} 'negative', as the lines before"
        rows.append(row)
        return ""

    read_jsonl(path, fields={}, check=check)
    return rows


class TextPairBatches(Schedule):
    """Batches of texts that belong together, each a pure function of the step number.

    A batch has ``input_ids`` and ``attention_mask`` of the anchors, ``positive_ids``
    and ``positive_mask``, perhaps ``negative_ids`` and ``negative_mask``, all
    ``[b, t]`` int32, and ``weights`` ``[b]`` float32, 0 for filler rows. A row's texts
    are padded to one length.

    Args:
      examples: mappings with ``texts``, the token ids of two or three texts.
      batch_size: rows per batch.
      buckets: increasing lengths to pad to; `length_buckets` if None.
      seed: seed of the shuffling.
      shuffle: False keeps the order within each bucket, for evaluation.

    Raises:
      ValueError: if there are no examples, a text is empty or too long, or an argument
        is out of range.

    Example:
      >>> data = [{"texts": ([5, 6], [7])}, {"texts": ([5], [8, 9, 9])}]
      >>> batch = TextPairBatches(data, 2, [4], shuffle=False).batch_at(0)
      >>> batch["positive_ids"].tolist(), batch["weights"].tolist()
      ([[7, 0, 0, 0], [8, 9, 9, 0]], [1.0, 1.0])
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        buckets: Sequence[int] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._texts = [
            [np.asarray(ids, np.int32) for ids in example["texts"]]
            for example in examples
        ]
        if any(not len(ids) for texts in self._texts for ids in texts):
            raise ValueError("every text must have at least 1 token.")
        lengths = [max(map(len, texts)) for texts in self._texts]
        super().__init__(lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _pad(self, length: int, members: np.ndarray, count: int) -> Batch:
        batch: Batch = {"weights": row_weights(len(members), count)}
        kinds = list(ARRAYS.values())[: len(self._texts[0])]
        for place, names in enumerate(kinds):
            texts = [self._texts[member][place] for member in members]
            batch |= zip(names, pad_ids(texts, length, count), strict=True)
        return batch

    def _add_contents(self, digest: Any) -> None:
        for texts in self._texts:
            for ids in texts:
                digest.update(len(ids).to_bytes(8, "little"))
                digest.update(ids.astype("<i4").tobytes())


def by_role(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a batch of `TextPairBatches` as `embedding_loss` takes it."""
    found = {
        role: (batch[ids], batch[mask])
        for role, (ids, mask) in ARRAYS.items()
        if ids in batch
    }
    return {**found, "weights": batch["weights"]}
