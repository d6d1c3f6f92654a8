"""Combines adapters, and extracts adapters from differences of kernels.

The sum ``ΔW = Σ w_k s_k A_k B_k`` of adapters on one base is exactly ``A B`` with
``A = [A_1 A_2 ...]`` and ``B = [w_1 s_1 B_1; w_2 s_2 B_2; ...]``, at the sum of the
ranks. Everything else here truncates a matrix to a rank by SVD, and reports the error.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import LORA_A, LORA_B
from lora_jax.ops.dora import merge_dora
from lora_jax.ops.low_rank import LowRank, as_matrices, best_factors, truncate_factors
from lora_jax.tree.merge import check_adapters
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child

METHODS = ("cat", "svd", "ties", "dare", "dare_ties")


class Combined(NamedTuple):
    """An adapter computed from others.

    Attributes:
      lora: the tree of A and B.
      config: a config that adapts exactly its layers.
      errors: the relative truncation error of each layer's ΔW, ``‖ΔW - s A B‖ / ‖ΔW‖``,
        by path.
    """

    lora: PyTree
    config: LoRAConfig
    errors: dict[str, float]


def combine_adapters(
    adapters: Sequence[tuple[Mapping[str, Any], Sequence[Target]]],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
) -> Combined:
    """Combines adapters on one base into one LoRA adapter.

    Methods, for the changes ``D_k = s_k A_k B_k`` (with DoRA ``W_k - W0``):

    - ``"cat"``: ``Σ w_k D_k``, exactly, at the sum of the ranks of each layer.
    - ``"svd"``: ``Σ w_k D_k``, truncated to ``rank``.
    - ``"ties"``: keeps the fraction ``density`` of each ``D_k`` with the largest
      magnitudes, then the elements whose sign is that of their sum over k, and averages
      ``w_k D_k`` over what is kept; truncated to ``rank``.
    - ``"dare"``: keeps each element of ``D_k`` with probability ``density``, divided by
      ``density``; ``Σ w_k D_k``, truncated to ``rank``.
    - ``"dare_ties"``: prunes like ``"dare"``, then elects and averages like ``"ties"``.

    An adapter without a layer has ``D_k = 0`` there (TIES averages over the others).

    Args:
      adapters: trees of A and B, each with its targets.
      weights: ``w_k``, one for each; -1 negates.
      method: see above.
      rank: of the result; required by all methods but ``"cat"``.
      density: of ``"ties"`` and DARE, above 0 and at most 1.
      seed: of DARE.
      params: the base, which DoRA needs.

    Returns:
      The adapter, with a scaling of 1: each layer's alpha is its rank. ``"cat"`` of a
      single adapter keeps its A, its scaling and (at a weight of 1) its magnitudes.

    Raises:
      ValueError: if the numbers of adapters and weights differ, a weight is not finite,
        an option is out of range, adapters have different layers under one path, or
        DoRA meets ``"cat"`` or no base; lists all of these.

    References:
      TIES: Yadav et al., https://arxiv.org/abs/2306.01708, section 4. DARE: Yu et al.,
      https://arxiv.org/abs/2311.03099, section 3.
    """
    trees = [flatten(lora) for lora, _ in adapters]
    tables = [{row.path: row for row in targets} for _, targets in adapters]
    faults = _option_faults(len(adapters), weights, method, rank, density)
    if seed < 0:
        faults.append(f"seed must be at least 0; got {seed}")
    layers = {row.path: row for table in tables for row in table.values()}
    for path, row in layers.items():
        same = [table[path] for table in tables if path in table]
        if not all(other.is_same_layer(row) for other in same):
            shapes = [other.kernel_shape for other in same]
            faults.append(f"{path} must be the same layer in all; got kernels {shapes}")
    dora = [i for i, t in enumerate(tables) if any(row.dora for row in t.values())]
    is_itself = method == "cat" and len(adapters) == 1
    if dora and method == "cat" and not (is_itself and weights[0] == 1):
        faults.append(
            f"adapters {dora} are DoRA, whose change of W0 has full rank: method must "
            "be 'svd', with a rank; got 'cat'"
        )
    elif dora and params is None and not is_itself:
        faults.append(f"params must be the base, as adapters {dora} are DoRA; got None")
    if faults:
        raise ValueError(f"adapters can't be combined: {'; '.join(faults)}.")
    for tree, (_, targets) in zip(trees, adapters, strict=True):
        check_adapters(tree, targets)
    if is_itself:
        return _scaled(trees[0], tables[0], weights[0])
    base = flatten(params) if params is not None else {}
    found = {}
    for path in layers:
        members = [
            (weight, table[path], tree)
            for weight, table, tree in zip(weights, tables, trees, strict=True)
            if path in table
        ]
        if method in ("cat", "svd") and not any(row.dora for _, row, _ in members):
            found[path] = _concatenated(members, rank)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            deltas = np.stack([_delta(row, tree, base) for _, row, tree in members])
            scales = np.array([weight for weight, _, _ in members])
            total = _merge_deltas(deltas, scales, method, density, rng)
            found[path] = best_factors(total, rank or 0)
    return _as_adapter(found, layers)


def extract_adapter(
    params: Mapping[str, Any],
    tuned: Mapping[str, Any],
    targets: Sequence[Target],
) -> Combined:
    """Extracts the LoRA adapter closest to the difference of two models.

    Args:
      params: the base.
      tuned: the same model, trained in full.
      targets: the layers to extract, with their ranks.

    Returns:
      The adapter, with a scaling of 1. ``1 - errors[path]²`` is the energy that a
      layer keeps.

    Raises:
      ValueError: listing each kernel that ``tuned`` lacks, that has another shape
        there, or that is not finite.
    """
    before, after = flatten(params), flatten(tuned)
    faults = []
    for row in targets:
        new = after.get(row.weight_path)
        if new is None:
            faults.append(f"{row.weight_path} is missing")
        elif jnp.shape(new) != row.kernel_shape:
            shape = jnp.shape(new)
            faults.append(f"{row.weight_path} must be {row.kernel_shape}; got {shape}")
        elif not jnp.isfinite(jnp.asarray(new)).all():
            faults.append(f"{row.weight_path} contains NaN or infinity")
    if faults:
        raise ValueError(f"no adapter can be extracted: {'; '.join(faults)}.")
    found = {}
    for row in targets:
        new, old = (
            as_matrices(tree[row.weight_path], row.contraction)
            for tree in (after, before)
        )
        found[row.path] = best_factors(new - old, row.rank)
    return _as_adapter(found, {row.path: row for row in targets})


def _option_faults(
    count: int,
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float,
) -> list[str]:
    faults = []
    if count == 0 or len(weights) != count:
        faults.append(
            f"there must be an adapter or more, and a weight for each; got {count} "
            f"adapters and {len(weights)} weights"
        )
    if bad := [weight for weight in weights if not np.isfinite(weight)]:
        faults.append(f"weights must be finite; got {bad}")
    if method not in METHODS:
        faults.append(f"method must be one of {METHODS}; got {method!r}")
    if method == "cat" and rank is not None:
        faults.append(
            f"method 'cat' keeps all ranks, so rank must be None; got {rank}. 'svd' "
            "cuts the same sum to a rank"
        )
    if method != "cat" and (rank is None or rank < 1):
        faults.append(f"method {method!r} needs a rank of at least 1; got {rank}")
    if not 0 < density <= 1:
        faults.append(f"density must be above 0 and at most 1; got {density}")
    return faults


Member = tuple[float, Target, Mapping[str, Any]]  # weight, layer, leaves by path


def _factors(row: Target, tree: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns A ``[*batch, i, r]`` and ``scaling * B`` ``[*batch, r, o]``, float64."""
    a, b, _ = row.plain(tree)[:3]
    batch, inputs, outputs = row.contraction.split(row.kernel_shape)
    a = np.asarray(a, np.float64).reshape(*batch, math.prod(inputs), row.rank)
    b = np.asarray(b, np.float64).reshape(*batch, row.rank, math.prod(outputs))
    return a, b * row.scaling


def _scaled(
    tree: Mapping[str, Any], table: Mapping[str, Target], weight: float
) -> Combined:
    """Returns one adapter times a weight, keeping its factors and scaling."""
    leaves = {
        path: leaf * weight if path.rpartition("/")[2] == LORA_B else leaf
        for path, leaf in tree.items()
    }
    config = LoRAConfig.for_layers(
        {path: row.rank for path, row in table.items()},
        {path: row.scaling * row.rank for path, row in table.items()},
        dora=any(row.dora for row in table.values()),
    )
    return Combined(unflatten(leaves), config, dict.fromkeys(table, 0.0))


def _concatenated(members: Sequence[Member], rank: int | None) -> LowRank:
    """Sums changes exactly, or truncates the sum to a rank."""
    pairs = [_factors(row, tree) for _, row, tree in members]
    a = np.concatenate([a for a, _ in pairs], axis=-1)
    b = [b * weight for (_, b), (weight, _, _) in zip(pairs, members, strict=True)]
    b = np.concatenate(b, axis=-2)
    return LowRank(a, b, 0.0) if rank is None else truncate_factors(a, b, rank)


def _delta(row: Target, tree: Mapping[str, Any], base: Mapping[str, Any]) -> np.ndarray:
    """Returns one adapter's change of a kernel, ``[*batch, i, o]``."""
    if not row.dora:
        a, b = _factors(row, tree)
        return a @ b
    kernel = jnp.asarray(base[row.weight_path], jnp.float32)
    options: dict[str, Any] = {"scaling": row.scaling, "contraction": row.contraction}
    merged = merge_dora(kernel, *map(jnp.asarray, row.plain(tree)[:3]), **options)
    return as_matrices(merged, row.contraction) - as_matrices(kernel, row.contraction)


def _merge_deltas(
    deltas: np.ndarray,
    weights: np.ndarray,
    method: str,
    density: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Applies a method to changes ``[k, *batch, i, o]``; returns ``[*batch, i, o]``."""
    if method.startswith("dare"):
        deltas = deltas * (rng.random(deltas.shape) < density) / density
    elif method == "ties":
        flat = np.abs(deltas).reshape(*deltas.shape[:-2], -1)
        kept = int(density * flat.shape[-1])
        order = np.argsort(-flat, axis=-1, kind="stable")
        mask = np.zeros(flat.shape, bool)
        np.put_along_axis(mask, order[..., :kept], values=True, axis=-1)
        deltas = deltas * mask.reshape(deltas.shape)
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    if not method.endswith("ties"):
        return weighted.sum(0)
    elected = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    return (weighted * elected).sum(0) / np.maximum(elected.sum(0), 1)


def _as_adapter(found: Mapping[str, LowRank], layers: Mapping[str, Target]) -> Combined:
    """Returns factors in the tree's layout, with a config whose scaling is 1."""
    ranks = {path: factors.a.shape[-1] for path, factors in found.items()}
    config = LoRAConfig.for_layers(ranks, {path: float(r) for path, r in ranks.items()})
    leaves = {}
    for path, (a, b, _) in found.items():
        layer = layers[path]
        shapes = layer.contraction.factor_shapes(layer.kernel_shape, ranks[path])
        factors = (
            jnp.asarray(array.reshape(shape), jnp.float32)
            for array, shape in zip((a, b), shapes, strict=True)
        )
        a, b = layer.as_stored(*factors)
        leaves |= {child(path, LORA_A): a, child(path, LORA_B): b}
    errors = {path: factors.error for path, factors in found.items()}
    return Combined(unflatten(leaves), config, errors)
