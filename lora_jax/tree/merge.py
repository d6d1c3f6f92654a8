"""Merging all adapters of a model into its base, and unmerging them.

Unmerging restores W0 from the base, bit for bit; nothing is subtracted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.ops.contraction import Shape
from lora_jax.ops.dora import dora_scale, merge_dora, over_kernel
from lora_jax.ops.merge import add_delta, delta_kernel, is_finite
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


class MergeError(NamedTuple):
    """The rounding error of a merged kernel relative to ``W0 + scaling * A B``.

    With DoRA, relative to ``(m / n) (W0 + scaling * A B)``.

    Attributes:
      path: path of the layer.
      relative: norm of the error over the norm of the change to ``W0``.
      largest: largest absolute error of any element.
    """

    path: str
    relative: float
    largest: float


def merge_params(
    params: Mapping[str, Any], lora: Mapping[str, Any], targets: Sequence[Target]
) -> dict[str, Any]:
    """Returns the base with every adapter merged in.

    Each kernel is computed in float32 and rounded once to its own dtype. Works under
    `jax.jit`, but without the NaN check.

    Args:
      params: the joined base tree.
      lora: the adapter tree; of methods with a collection ``fixed``, joined with it
        (`lora_jax.tree.partition.adapter_of`).
      targets: the adapted layers.

    Returns:
      A parameter tree for the plain model.

    Raises:
      ValueError: listing every adapter that is missing, has the wrong shape or is not
        finite, every merged kernel that is not finite, and every layer that transforms
        its kernel before use; then nothing is merged.
    """
    flat, adapters = flatten(params), flatten(lora)
    check_adapters(adapters, targets)
    if transformed := [target.path for target in targets if not target.is_plain]:
        raise ValueError(
            f"{', '.join(transformed)} can't be merged: their modules transform the "
            "kernel before use, so no stored kernel is equivalent to W0 + A B. Use the "
            "model unmerged."
        )
    merged = {}
    for target in targets:
        merge = merge_dora if target.dora else add_delta
        merged[target.weight_path] = merge(
            flat[target.weight_path], *_plain(adapters, target), **_options(target)
        )
    bad = [path for path, kernel in merged.items() if not is_finite(kernel)]
    if bad:
        raise ValueError(
            f"merged kernels must be finite; {', '.join(bad)} contain NaN or inf, from "
            "the base itself or a sum too large for its dtype. Nothing was merged."
        )
    return unflatten({**flat, **merged})


def unmerge_params(
    merged: Mapping[str, Any], params: Mapping[str, Any], targets: Sequence[Target]
) -> dict[str, Any]:
    """Returns ``merged`` with the base's kernels restored, bit for bit.

    Args:
      merged: the result of `merge_params`.
      params: the base tree it was made from.
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
    """Measures the error of rounding merged kernels to their dtype.

    Args:
      params: the joined base tree.
      merged: the result of `merge_params`.
      lora: the adapter tree.
      targets: the adapted layers.

    Returns:
      One row per target, in order.
    """
    base, new, adapters = flatten(params), flatten(merged), flatten(lora)
    rows = []
    for target in targets:
        kernel = np.asarray(base[target.weight_path], np.float64)
        wanted = _wanted(base[target.weight_path], _plain(adapters, target), target)
        error = np.asarray(new[target.weight_path], np.float64) - wanted
        size = float(np.linalg.norm(wanted - kernel))
        relative = float(np.linalg.norm(error)) / size if size else 0.0
        rows.append(MergeError(target.path, relative, float(np.abs(error).max())))
    return rows


def check_adapters(adapters: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Raises unless every target has a finite adapter of the right shapes.

    Raises:
      ValueError: listing every leaf that is missing, unexpected, of the wrong shape, or
        not finite.
    """
    shapes = {
        child(target.path, leaf): shape
        for target in targets
        for leaf, shape in target.leaf_shapes.items()
    }
    faults = leaf_faults(adapters, shapes, "has no target")
    faults += not_finite(adapters, shapes)
    if faults:
        raise ValueError(f"the adapter does not fit the model: {'; '.join(faults)}.")


def leaf_faults(
    given: Mapping[str, Any], shapes: Mapping[str, Shape], extra: str
) -> list[str]:
    """Lists the leaves that are missing, of the wrong shape, or ``extra``, by path."""
    there = sorted(given.keys() & shapes.keys())
    return [
        *(f"{path} is missing" for path in sorted(shapes.keys() - given.keys())),
        *(f"{path} {extra}" for path in sorted(given.keys() - shapes.keys())),
        *(
            f"{path} must be {shapes[path]}; got {jnp.shape(given[path])}"
            for path in there
            if jnp.shape(given[path]) != shapes[path]
        ),
    ]


def not_finite(given: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Lists those of the leaves that have NaN or infinity."""
    there = sorted(given.keys() & paths)
    return [f"{p} contains NaN or infinity" for p in there if not is_finite(given[p])]


def _plain(adapters: Mapping[str, Any], target: Target) -> tuple[Any, ...]:
    """Returns A, B and (with DoRA) m of the plain adapter, scanned axes first."""
    factors = target.plain(adapters)
    return tuple(map(jnp.asarray, factors[: 3 if target.dora else 2]))


def _options(target: Target) -> dict[str, Any]:
    return {"scaling": target.scaling, "contraction": target.contraction}


def _wanted(kernel: Any, leaves: tuple[Any, ...], target: Target) -> np.ndarray:
    """Returns the merged kernel before rounding."""
    a, b = leaves[:2]
    delta = delta_kernel(a, b, target.kernel_shape, **_options(target))
    wanted = np.asarray(kernel, np.float64) + np.asarray(delta, np.float64)
    if not target.dora:
        return wanted
    scale = dora_scale(jnp.asarray(kernel), *leaves, **_options(target))
    return np.asarray(over_kernel(scale, target.contraction)) * wanted
