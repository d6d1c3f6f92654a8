"""Combines the weights that adapters train in full, such as heads and norms."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.tree.paths import flatten, unflatten


def combine_trained(
    trees: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    base: Mapping[str, Any],
    *,
    absent: Collection[str] = (),
) -> PyTree:
    """Adds up changes of weights of the base; averages weights that only adapters have.

    Computes ``W = W0 + Σ w_k (W_k - W0)``, as LoRA's ΔW add up, over the adapters that
    train ``W``. Of a head that the base lacks there is no W0, and it is
    ``Σ w_k W_k / Σ w_k``. In float64, rounded once.

    Args:
      trees: the weights that each adapter trains in full.
      weights: ``w_k``, one for each adapter.
      base: the base's parameters, with (any) values for ``absent`` too.
      absent: the paths that the base lacks.

    Returns:
      The tree of all weights that an adapter trains.

    Raises:
      ValueError: listing every weight whose shape differs between adapters or from the
        base's, and every average whose weights add up to 0.

    Example:
      >>> base, one, two = ({"bias": jnp.full(2, x)} for x in (1.0, 1.0, 5.0))
      >>> combine_trained([one, two], [1.0, 0.5], base)["bias"].tolist()
      [3.0, 3.0]
    """
    flat, first = [flatten(tree) for tree in trees], flatten(base)
    found, faults = {}, []
    for path in dict.fromkeys(path for tree in flat for path in tree):
        own = [
            (weight, tree[path])
            for weight, tree in zip(weights, flat, strict=True)
            if path in tree
        ]
        shapes = {jnp.shape(leaf) for _, leaf in own}
        if path not in absent:
            shapes.add(jnp.shape(first[path]))
        total = sum(weight for weight, _ in own)
        if len(shapes) > 1:
            faults.append(f"{path} has shapes {sorted(map(list, shapes))}")
            continue
        if path in absent and total == 0:
            faults.append(f"the base has no {path}, and weights of it add up to 0")
            continue
        dtype = jnp.result_type(*(leaf for _, leaf in own))
        leaves = [(weight, np.asarray(leaf, np.float64)) for weight, leaf in own]
        if path in absent:
            value = sum(weight * leaf for weight, leaf in leaves) / total
        else:
            start = np.asarray(first[path], np.float64)
            value = start + sum(weight * (leaf - start) for weight, leaf in leaves)
        found[path] = jnp.asarray(value, dtype)
    if faults:
        raise ValueError(
            f"weights that adapters train in full can't be combined: "
            f"{'; '.join(faults)}. Take those of one adapter (`--head DIR`)."
        )
    return unflatten(found)
