"""Holding out a part of the training examples for validation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import listed
from lora_jax.finetune.sections import DataSettings


def hold_out(
    rows: dict[str, list[Any]],
    data: DataSettings,
    adapters: Sequence[str] = (),
    adapter_of: Callable[[Any], int] | None = None,
) -> dict[str, list[Any]]:
    """Splits off a validation split from the training examples if it has no file.

    Args:
      rows: the examples of each split.
      data: the settings.
      adapters: names of the adapters; each has its own part held out.
      adapter_of: returns the number of an example's adapter.

    Returns:
      The splits, in the order of `SPLITS`.

    Raises:
      UserError: if no training examples are left.
    """
    is_given = data.validation is not None or "validation" in rows
    if is_given or "train" not in rows:
        return rows
    train = rows["train"]
    parts: list[list[int]] = [[] for _ in adapters or [""]]
    for place, row in enumerate(train):
        parts[adapter_of(row) if adapters and adapter_of else 0].append(place)
    counts = [max(1, round(data.holdout * len(part))) for part in parts]
    sizes = zip(parts, counts, strict=True)
    small = [i for i, (part, count) in enumerate(sizes) if count >= len(part)]
    if small:
        first = len(parts[small[0]])
        whose = f" of {listed([adapters[i] for i in small])}" if adapters else ""
        raise UserError(
            f"data.train has {first} example{'s' * (first != 1)}{whose}, and "
            f"data.holdout = {data.holdout} leaves none for training; set "
            "data.validation to a file."
        )
    rng, chosen = np.random.default_rng(data.seed), set()
    for part, count in zip(parts, counts, strict=True):
        order = rng.permutation(len(part))
        chosen |= {part[i] for i in order[:count].tolist()}
    return {
        "train": [row for i, row in enumerate(train) if i not in chosen],
        "validation": [row for i, row in enumerate(train) if i in chosen],
        **{name: found for name, found in rows.items() if name != "train"},
    }
