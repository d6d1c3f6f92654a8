"""Merging all adapters of a model into its base, and taking them out again.

The base keeps W0, so taking an adapter out is looking W0 up, bit for bit; nothing is
ever subtracted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.names import LORA_A, LORA_B
from lora_jax.ops.merge import delta_kernel, merge_kernel
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


class MergeError(NamedTuple):
    """How far a merged kernel is from ``W0 + scaling * A B``, by rounding.

    Attributes:
      path: of the layer.
      relative: norm of the error over the norm of ``scaling * A B``; 0 for no update.
      largest: largest absolute error of an element.
    """

    path: str
    relative: float
    largest: float


def merge_params(
    params: Mapping[str, Any], lora: Mapping[str, Any], targets: Sequence[Target]
) -> dict[str, Any]:
    """Returns the base with every adapter folded in.

    Each kernel is computed in float32 and rounded once to its own dtype. Works under
    `jax.jit`, where the check for NaN is left out.

    Args:
      params: the joined base tree; not changed.
      lora: the adapter tree.
      targets: the adapted layers.

    Returns:
      A plain tree for the plain model.

    Raises:
      ValueError: naming every adapter with a NaN or an infinity, or missing; then
        nothing is merged.
    """
    flat, adapters = flatten(params), flatten(lora)
    check_adapters(adapters, targets)
    for target in targets:
        a, b = target.batch_first(*_factors(adapters, target))
        flat[target.weight_path] = merge_kernel(
            flat[target.weight_path],
            a,
            b,
            scaling=target.scaling,
            contraction=target.site.contraction,
        )
    return unflatten(flat)


def unmerge_params(
    merged: Mapping[str, Any], params: Mapping[str, Any], targets: Sequence[Target]
) -> dict[str, Any]:
    """Returns ``merged`` with the adapters taken out, bit for bit.

    Args:
      merged: the result of `merge_params`.
      params: the base tree that was merged into.
      targets: the adapted layers.

    Returns:
      ``merged`` with every adapted kernel replaced by the base's.
    """
    flat, base = flatten(merged), flatten(params)
    flat.update({t.weight_path: base[t.weight_path] for t in targets})
    return unflatten(flat)


def merge_errors(
    params: Mapping[str, Any],
    merged: Mapping[str, Any],
    lora: Mapping[str, Any],
    targets: Sequence[Target],
) -> list[MergeError]:
    """Measures what rounding to the kernels' dtype cost.

    Args:
      params: the joined base tree.
      merged: the result of `merge_params`.
      lora: the adapter tree.
      targets: the adapted layers.

    Returns:
      One row a target, in their order.
    """
    base, new, adapters = flatten(params), flatten(merged), flatten(lora)
    rows = []
    for target in targets:
        a, b = target.batch_first(*_factors(adapters, target))
        delta = np.asarray(
            delta_kernel(
                a,
                b,
                target.kernel_shape,
                scaling=target.scaling,
                contraction=target.site.contraction,
            ),
            np.float64,
        )
        wanted = np.asarray(base[target.weight_path], np.float64) + delta
        error = np.asarray(new[target.weight_path], np.float64) - wanted
        size = float(np.linalg.norm(delta))
        relative = float(np.linalg.norm(error)) / size if size else 0.0
        rows.append(MergeError(target.path, relative, float(np.abs(error).max())))
    return rows


def check_adapters(adapters: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Raises unless every target has a finite A and B.

    Args:
      adapters: leaves of the adapter tree by path.
      targets: the adapted layers.

    Raises:
      ValueError: naming every leaf that is missing, left over, or not finite.
    """
    wanted = {child(t.path, leaf) for t in targets for leaf in (LORA_A, LORA_B)}
    faults = [f"{path} is missing" for path in sorted(wanted - set(adapters))]
    faults += [f"{path} has no target" for path in sorted(set(adapters) - wanted)]
    faults += [
        f"{path} has values that are not finite"
        for path in sorted(wanted & set(adapters))
        if not isinstance(adapters[path], jax.core.Tracer)
        and not bool(jnp.isfinite(adapters[path]).all())
    ]
    if faults:
        raise ValueError(f"the adapter does not fit the model: {'; '.join(faults)}.")


def _factors(adapters: Mapping[str, Any], target: Target) -> tuple[Any, Any]:
    return adapters[child(target.path, LORA_A)], adapters[child(target.path, LORA_B)]
