"""Merging all adapters of a model into its base, and taking them out again.

The base keeps W0, so taking an adapter out is looking W0 up, bit for bit; nothing is
ever subtracted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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
      ValueError: naming every adapter that is missing, has another shape or a NaN or
        an infinity, and every merged kernel with one; then nothing is merged.
    """
    flat, adapters = flatten(params), flatten(lora)
    check_adapters(adapters, targets)
    merged = {}
    for target in targets:
        a, b = target.batch_first(*_factors(adapters, target))
        merged[target.weight_path] = merge_kernel(
            flat[target.weight_path],
            a,
            b,
            scaling=target.scaling,
            contraction=target.site.contraction,
        )
    bad = [path for path, kernel in merged.items() if not _is_finite(kernel)]
    if bad:
        raise ValueError(
            f"merged kernels must be finite; {', '.join(bad)} hold NaN or inf, from "
            "the base itself or from a sum too large for its dtype. Nothing is merged."
        )
    return unflatten({**flat, **merged})


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
    """Raises unless every target has a finite A and B of its shapes.

    Args:
      adapters: leaves of the adapter tree by path.
      targets: the adapted layers.

    Raises:
      ValueError: naming every leaf that is missing, left over, mis-shaped, or not
        finite.
    """
    shapes = {
        child(target.path, leaf): shape
        for target in targets
        for leaf, shape in zip((LORA_A, LORA_B), target.factor_shapes, strict=True)
    }
    wanted = set(shapes)
    faults = [f"{path} is missing" for path in sorted(wanted - set(adapters))]
    faults += [f"{path} has no target" for path in sorted(set(adapters) - wanted)]
    there = sorted(wanted & set(adapters))
    faults += [
        f"{path} must be {shapes[path]}; got {jnp.shape(adapters[path])}"
        for path in there
        if jnp.shape(adapters[path]) != shapes[path]
    ]
    faults += [
        f"{path} has values that are not finite"
        for path in there
        if not _is_finite(adapters[path])
    ]
    if faults:
        raise ValueError(f"the adapter does not fit the model: {'; '.join(faults)}.")


def _is_finite(array: Any) -> bool:
    """Says whether all is finite, as far as can be known while tracing."""
    return isinstance(array, Tracer) or bool(jnp.isfinite(array).all())


def _factors(adapters: Mapping[str, Any], target: Target) -> tuple[Any, Any]:
    return adapters[child(target.path, LORA_A)], adapters[child(target.path, LORA_B)]
