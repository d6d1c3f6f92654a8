"""Leaves of a tree on the host, by path, and back onto their devices."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree


def host_leaves(tree: PyTree, *, copy: bool = True) -> dict[str, np.ndarray]:
    """Returns the leaves as NumPy arrays by path; PRNG keys as their data.

    Args:
      tree: of jax arrays.
      copy: False may return views of the arrays' own buffers, as it does on CPU: for
        looking at, not for keeping past the step that the arrays are donated to.

    Returns:
      Arrays by ``/``-joined path.
    """
    convert = np.array if copy else np.asarray
    return {
        _name(path): convert(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def place(leaves: dict[str, np.ndarray], like: PyTree) -> PyTree:
    """Puts leaves where, and as what, their counterparts in another tree are.

    Args:
      leaves: from `host_leaves`.
      like: a tree of jax arrays with the same paths.

    Returns:
      A tree of new arrays with the structure, kinds of keys and shardings of ``like``.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place_one(leaves[_name(path)], leaf), like
    )


def facts_of(leaf: np.ndarray) -> list[Any]:
    """Returns shape, dtype and CRC-32 of a leaf, as JSON values.

    Args:
      leaf: any array.

    Returns:
      ``[[3, 2], "float32", 1234]``.
    """
    return [list(leaf.shape), str(leaf.dtype), zlib.crc32(leaf.tobytes())]


def _place_one(value: np.ndarray, like: jax.Array) -> jax.Array:
    if _is_key(like):
        impl = jax.random.key_impl(like)
        return jax.random.wrap_key_data(jnp.array(value), impl=impl)
    if like.committed:
        return jax.device_put(value, like.sharding, may_alias=False)
    return jnp.array(value)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
