"""Padding a run's leaves with zeros to those of a step that runs share, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is a PRNG key."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def padded_as(template: PyTree, tree: PyTree) -> PyTree:
    """Returns a tree with the template's structure, whose leaves come in that order."""
    pairs = zip(jax.tree.leaves(template), jax.tree.leaves(tree), strict=True)
    leaves = [padded(y, x.shape) for x, y in pairs]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def padded(leaf: Any, shape: tuple[int, ...]) -> Any:
    """Returns a leaf with zeros up to a shape, on the host."""
    if is_key(leaf):
        return leaf
    wide = np.zeros(shape, leaf.dtype)
    wide[tuple(map(slice, leaf.shape))] = leaf
    return wide


def cut(leaf: Any, like: Any) -> Any:
    """Undoes `padded`."""
    if is_key(leaf):
        return jax.device_put(leaf, like.sharding)
    return jax.device_put(
        np.asarray(leaf)[tuple(map(slice, like.shape))], like.sharding
    )
