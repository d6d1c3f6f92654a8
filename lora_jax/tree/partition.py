"""Splitting one parameter tree into three collections, and joining them.

``frozen`` holds W0, ``lora`` the adapters, ``params`` the weights trained in full and,
with some methods, ``fixed`` the leaves of adapters that aren't trained. The paths
mirror each other, and no leaf is in two collections.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import (
    ADAPTER,
    ADAPTER_LEAVES,
    BIAS,
    FIXED,
    FROZEN,
    LORA,
    LORA_A,
    PARAMS,
    TOKEN_ROWS,
)
from lora_jax.tree.paths import flatten, unflatten


def partition(params: Mapping[str, Any], config: LoRAConfig) -> dict[str, PyTree]:
    """Splits a joined tree into its collections.

    Args:
      params: base weights, with or without ``lora_a`` and the other adapter leaves
        beside them.
      config: selects the base weights trained in full. ``bias="lora_only"`` requires
        the adapters in the tree, since they identify the adapted layers.

    Returns:
      ``{"frozen": ..., "lora": ..., "params": ..., "fixed": ...}`` with the same
      leaves, not copied; empty collections are omitted, except ``lora``.

    Raises:
      ValueError: if the config has ``bias="lora_only"`` and the tree has biases but no
        adapter.

    Example:
      >>> tree = {"up": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "head": {"kernel": 4}}
      >>> partition(tree, LoRAConfig(train=["head"]))["params"]
      {'head': {'kernel': 4}}
    """
    parts: dict[str, dict[str, Any]] = {
        name: {} for name in (FROZEN, LORA, PARAMS, FIXED)
    }
    flat = flatten(params)
    places = {path: path.rpartition("/") for path in flat}
    adapted = {owner for owner, _, name in places.values() if name == LORA_A}
    biases = [path for path, (_, _, name) in places.items() if name == BIAS]
    if config.bias == "lora_only" and biases and not adapted:
        raise ValueError(
            f"params must have {LORA_A!r} beside the kernels of adapted layers for "
            f"bias='lora_only'; got {len(biases)} biases and no adapter. "
            "`adapt(model, config).attach(params, key)` makes all collections."
        )
    for path, leaf in flat.items():
        owner, _, name = places[path]
        is_adapted = owner in adapted
        if is_adapted and name in ADAPTER_LEAVES:
            parts[config.leaves.get(name, LORA)][path] = leaf
        elif name == TOKEN_ROWS or config.is_trained(path, is_adapted=is_adapted):
            parts[PARAMS][path] = leaf
        else:
            parts[FROZEN][path] = leaf
    return {
        name: unflatten(flat) for name, flat in parts.items() if flat or name == LORA
    }


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Joins trees with disjoint leaves into one.

    Args:
      *trees: nested mappings, e.g. ``variables["frozen"]`` and ``variables["params"]``.

    Returns:
      One nested dictionary with the same leaves, not copied.

    Raises:
      ValueError: listing every path that occurs in two trees.
    """
    joined: dict[str, Any] = {}
    for tree in trees:
        flat = flatten(tree)
        if shared := sorted(set(joined) & set(flat)):
            raise ValueError(f"two collections contain the same leaves: {shared}.")
        joined.update(flat)
    return unflatten(joined)


def adapter_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all leaves of the adapters, trained or not, as one tree."""
    return join(*(variables.get(name, {}) for name in ADAPTER))


def upcast_leaves(tree: Mapping[str, Any], owners: Collection[str]) -> dict[str, Any]:
    """Casts bfloat16 and float16 leaves of the modules at ``owners`` to float32.

    Other leaves are not copied.
    """

    def upcast(path: str, leaf: Any) -> Any:
        is_half = getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)
        is_owned = path.rpartition("/")[0] in owners
        return jnp.asarray(leaf, jnp.float32) if is_half and is_owned else leaf

    return unflatten({path: upcast(path, leaf) for path, leaf in flatten(tree).items()})


def count(tree: PyTree) -> int:
    """Returns the number of elements in all leaves of ``tree``.

    Args:
      tree: arrays or anything with a ``size`` or ``shape``.

    Returns:
      The total.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
