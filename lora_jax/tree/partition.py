"""One parameter tree into three collections, and back.

``frozen`` holds W0, ``lora`` the adapters, ``params`` what is trained in full. They
mirror each other's paths and never share a leaf.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import ADAPTER_LEAVES, FROZEN, LORA, PARAMS
from lora_jax.tree.paths import flatten, unflatten


def partition(params: Mapping[str, Any], config: LoRAConfig) -> dict[str, PyTree]:
    """Splits a joined tree into its collections.

    Args:
      params: base weights, with or without ``lora_a`` and ``lora_b`` beside them.
      config: says which base weights are trained in full.

    Returns:
      ``{"frozen": ..., "lora": ..., "params": ...}`` of the same leaves, uncopied;
      empty ones are left out, save ``lora``.

    Example:
      >>> tree = {"up": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "head": {"kernel": 4}}
      >>> partition(tree, LoRAConfig(train=["head"]))["params"]
      {'head': {'kernel': 4}}
    """
    parts: dict[str, dict[str, Any]] = {FROZEN: {}, LORA: {}, PARAMS: {}}
    for path, leaf in flatten(params).items():
        if path.rpartition("/")[2] in ADAPTER_LEAVES:
            parts[LORA][path] = leaf
        else:
            parts[PARAMS if config.is_trained(path) else FROZEN][path] = leaf
    return {
        name: unflatten(flat) for name, flat in parts.items() if flat or name == LORA
    }


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Merges trees that share no leaf into one.

    Args:
      *trees: nested mappings, ``variables["frozen"]`` and ``variables["params"]`` say.

    Returns:
      One nested dictionary of the same leaves, uncopied.

    Raises:
      ValueError: naming every path that two trees have.
    """
    joined: dict[str, Any] = {}
    for tree in trees:
        flat = flatten(tree)
        if shared := sorted(set(joined) & set(flat)):
            raise ValueError(f"two collections hold the same leaves: {shared}.")
        joined.update(flat)
    return unflatten(joined)


def count(tree: PyTree) -> int:
    """Returns the number of elements in all leaves of ``tree``.

    Args:
      tree: arrays or anything with a ``size`` or ``shape``.

    Returns:
      The total.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
