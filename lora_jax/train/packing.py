"""Rows for a causal language model: one example each, or several packed into one.

A row is five arrays. At each place stand the token (``input_ids``), the token it has to
predict (``labels``, already shifted), what that prediction counts (``weights``), its
number in its own example (``positions``) and that example's number in the row
(``segment_ids``, 0 for padding). The last token of an example predicts nothing: its
label would be another example's first token. A model that lets tokens see their own
segment only computes for each example what it computes for it alone.
"""

import bisect
from collections.abc import Mapping, Sequence

import numpy as np

Example = Mapping[str, np.ndarray]
ROW_KEYS = ("input_ids", "labels", "weights", "positions", "segment_ids")


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Packs examples into few rows: the longest first, each where it fits tightest.

    Best-fit decreasing: at most 11/9 of the least possible number of rows, plus 4. A
    pure function of the lengths; equal ones keep their order.

    Args:
      lengths: of the examples, in tokens.
      row_length: of every row.

    Returns:
      For each row, the places of its examples in ``lengths``; each is in one row.

    Raises:
      ValueError: naming the examples, up to 20, that are empty or longer than a row.

    Example:
      >>> plan_rows([3, 7, 5, 2, 3], row_length=10)
      [[1, 0], [2, 4, 3]]

    References:
      Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    bad = [i for i, n in enumerate(lengths) if not 1 <= n <= row_length]
    if bad:
        shown = ", ".join(f"{lengths[i]} (example {i})" for i in bad[:20])
        raise ValueError(
            f"packed examples must have 1 to {row_length} tokens, a row's length; got "
            f"{len(bad)} that have not: {shown}. Truncate them or lengthen the rows."
        )
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(spaces, (lengths[i], -1))
        if place < len(spaces):
            left, row = spaces.pop(place)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > lengths[i]:
            bisect.insort(spaces, (left - lengths[i], row))
    return rows


def fill_rows(
    rows: Sequence[Sequence[Example]], row_length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Lays examples out in rows.

    Args:
      rows: the examples of each row, each with ``input_ids`` and ``loss_mask`` ``[n]``.
      row_length: of every row, at least that of its examples together.
      pad_id: the token that fills up rows.

    Returns:
      The five arrays of this module, ``[b, t]`` int32, ``weights`` float32.

    Example:
      >>> one = {"input_ids": np.array([5, 6, 7]), "loss_mask": np.array([0, 0, 1])}
      >>> two = {"input_ids": np.array([8, 9]), "loss_mask": np.array([0, 1])}
      >>> batch = fill_rows([[one, two]], row_length=6)
      >>> for key in ROW_KEYS:
      ...     print(f"{key:11} {batch[key][0].tolist()}")
      input_ids   [5, 6, 7, 8, 9, 0]
      labels      [6, 7, 0, 9, 0, 0]
      weights     [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
      positions   [0, 1, 2, 0, 1, 0]
      segment_ids [1, 1, 1, 2, 2, 0]
    """
    shape = (len(rows), row_length)
    batch: dict[str, np.ndarray] = {k: np.zeros(shape, np.int32) for k in ROW_KEYS}
    batch["input_ids"][:] = pad_id
    batch["weights"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            ids, mask = example["input_ids"], example["loss_mask"]
            own = slice(start, start + len(ids))
            batch["input_ids"][b, own] = ids
            batch["labels"][b, own][:-1] = ids[1:]
            batch["weights"][b, own][:-1] = mask[1:]
            batch["positions"][b, own] = np.arange(len(ids))
            batch["segment_ids"][b, own] = segment
            start = own.stop
    return batch
