"""Converting an adapter to the ranks and scaling of another.

A compiled function accepts any adapter with the shapes and scaling it was compiled for.
Adapters of different ranks can share one compilation if padded to the largest rank:
zero columns of A and zero rows of B don't change ``A B``, Adam keeps them at zero, and
the ratio of the scalings is folded into B.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.array_types import PyTree
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE
from lora_jax.tree.merge import check_adapters
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


def fit_adapter(
    lora: Mapping[str, Any], source: Sequence[Target], target: Sequence[Target]
) -> PyTree:
    """Rewrites an adapter for the ranks and alphas of another config.

    ``scaling' * A' B' = scaling * A B`` with ``A' = [A 0]`` and
    ``B' = [B; 0] * scaling / scaling'``: the same function, up to one rounding of B if
    the ratio of the scalings is not a power of two. DoRA's magnitude is unchanged.

    Args:
      lora: the adapter, with finite A and B.
      source: its targets.
      target: the new targets, with at least the same ranks. Layers missing from
        ``lora`` get zeros, which is no update (not possible with DoRA, where no
        magnitude is neutral).

    Returns:
      The adapter tree for ``target``.

    Raises:
      ValueError: if ``lora`` does not match ``source``; or listing every layer that
        ``target`` lacks or has with another kernel, a smaller rank, or another
        ``dora``.

    Example:
      >>> from lora_jax import LoRAConfig, adapt
      >>> import flax.linen as nn, jax
      >>> x, model = jnp.ones((1, 3)), nn.Dense(4)
      >>> small, large = (adapt(model, LoRAConfig(rank=r), x) for r in (1, 2))
      >>> lora = small.init(jax.random.key(0), x)["lora"]
      >>> fit_adapter(lora, small.targets(), large.targets())["lora_a"].shape
      (3, 2)
    """
    adapters = flatten(lora)
    check_adapters(adapters, source)
    wanted = {row.path: row for row in target}
    faults = []
    for row in source:
        other = wanted.get(row.path)
        if other is None:
            faults.append(f"{row.path} is not a target")
        elif other.dora != row.dora:
            faults.append(f"{row.path} must have dora={row.dora}; got {other.dora}")
        elif not other.is_same_layer(row):
            faults.append(
                f"{row.path} must have a kernel {row.kernel_shape} in the same layout; "
                f"got {other.kernel_shape}"
            )
        elif other.rank < row.rank:
            faults.append(
                f"{row.path} must have a rank of at least {row.rank}; got {other.rank}"
            )
    present = {row.path: row for row in source}
    faults += [
        f"{path} needs a magnitude (dora=True) but the adapter has none"
        for path, row in wanted.items()
        if row.dora and path not in present
    ]
    if faults:
        raise ValueError(f"the adapter can't be fitted: {'; '.join(faults)}.")
    fitted = {}
    for path, row in wanted.items():
        names = child(path, LORA_A), child(path, LORA_B)
        if path in present:
            a, b, _ = present[path].plain(adapters)[:3]
            a, b = _padded(a, b, present[path], row)
            factors = row.as_stored(a, b)
        else:
            factors = tuple(jnp.zeros(shape) for shape in row.factor_shapes)
        fitted.update(zip(names, factors, strict=True))
        if row.dora:
            fitted[child(path, MAGNITUDE)] = adapters[child(path, MAGNITUDE)]
    return unflatten(fitted)


def _padded(a, b, source: Target, target: Target):
    """Pads the rank of A (its last axis) and B (the one after its batch axes)."""
    more = (0, target.rank - source.rank)
    rank_axis = len(source.contraction.split(source.kernel_shape)[0])
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [more])
    sides = [(0, 0)] * b.ndim
    sides[rank_axis] = more
    return a, jnp.pad(b, sides) * (source.scaling / target.scaling)
