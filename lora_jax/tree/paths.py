"""Flat dictionaries keyed by ``/``-joined paths, and back to nested ones."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings by path, below an optional ``prefix``.

    That is ``{"block_0/query/kernel": leaf, ...}`` in tree order. Anything else than a
    mapping is a leaf; empty mappings are dropped.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionaries of a flat one: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def key_path(path: Any) -> str:
    """Returns a key path of `jax.tree_util` joined by ``/``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any pytree by ``/``-joined path, in JAX's order.

    For nested mappings, `flatten` preserves the order of keys.

    Example:
      >>> leaves_by_path({"b": [1, 2], "a": 0})
      {'a': 0, 'b/0': 1, 'b/1': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {key_path(path): leaf for path, leaf in leaves}


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known path most similar to ``name``, and how many more end like it.

    That is ``"block_0/attn/q_proj (+23)"``, or an empty string if ``known`` is empty.
    """
    known = list(known)
    depth = name.count("/") + 1
    ends: dict[str, list[str]] = {}
    for path in known:
        ends.setdefault("/".join(path.split("/")[-depth:]), []).append(path)
    close = difflib.get_close_matches(name, ends, n=1, cutoff=0.0)
    if not close:
        return ""
    first, *others = ends[close[0]]
    return f"{first} (+{len(others)})" if others else first
