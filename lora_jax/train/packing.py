"""Rows for a causal language model, with one or several packed examples each.

A row consists of five arrays: for each position the token (``input_ids``), its target
(``labels``, already shifted), the target's loss weight (``weights``), the position in
its example (``positions``) and the example's number in the row (``segment_ids``, 0 for
padding). An example's last token has no target: it would be the next example's first
token. With attention masked by segment, packing does not change any example's result.
"""

import bisect
from collections.abc import Mapping, Sequence

import numpy as np

Example = Mapping[str, np.ndarray]
ROW_KEYS = ("input_ids", "labels", "weights", "positions", "segment_ids")


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Packs examples into few rows by best-fit decreasing.

    Needs at most 11/9 of the minimum number of rows, plus 4. A pure function of the
    lengths; examples of equal length keep their order.

    Args:
      lengths: lengths of the examples, in tokens.
      row_length: length of every row.

    Returns:
      For each row, the indices of its examples; each example is in exactly one row.

    Raises:
      ValueError: listing up to 20 examples that are empty or longer than a row.

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
            f"packed examples must have 1 to {row_length} tokens, the row length; got "
            f"{len(bad)} that don't: {shown}. Truncate them or use longer rows."
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
    """Builds rows from examples.

    Args:
      rows: the examples of each row, each with ``input_ids`` and ``loss_mask`` ``[n]``.
      row_length: length of every row, at least the total of its examples.
      pad_id: the padding token.

    Returns:
      The five arrays, ``[b, t]`` int32 (``weights`` float32).

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
