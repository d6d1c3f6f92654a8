"""Arrays between devices and the host: leaves of a tree, and buffers to fill."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from lora_jax.array_types import PyTree
from lora_jax.parallel.mesh import put_array
from lora_jax.tree.paths import key_path, leaves_by_path

ALIGNMENT = 64  # bytes


def host_leaves(tree: PyTree, *, copy: bool = True) -> dict[str, np.ndarray]:
    """Returns the leaves as NumPy arrays by path; PRNG keys as their data.

    Args:
      tree: of arrays; of those spread over several processes each gets the whole,
        so that all of them have to call this.
      copy: False may return views of the arrays' own buffers, as it does on CPU: for
        looking at, not for keeping past the step that the arrays are donated to.

    Returns:
      Arrays by ``/``-joined path.
    """
    convert = np.array if copy else np.asarray

    def fetch(leaf: Any) -> np.ndarray:
        leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        is_spread = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return convert(process_allgather(leaf, tiled=True) if is_spread else leaf)

    return {path: fetch(leaf) for path, leaf in leaves_by_path(tree).items()}


def place(leaves: dict[str, np.ndarray], like: PyTree) -> PyTree:
    """Puts leaves where, and as what, their counterparts in another tree are.

    Args:
      leaves: from `host_leaves`.
      like: a tree of jax arrays with the same paths.

    Returns:
      A tree of new arrays with the structure, kinds of keys and shardings of ``like``.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place_one(leaves[key_path(path)], leaf), like
    )


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array to be filled that `jax.device_put` takes as it is on CPU.

    XLA wants its buffers at multiples of `ALIGNMENT`, which NumPy's are not: it would
    copy them.

    Args:
      shape: of the array.
      dtype: of the array.

    Returns:
      The array, not initialised.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


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
        data = _place_one(value, jax.random.key_data(like))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    if not like.committed:
        return jnp.array(value)
    if like.sharding.is_fully_addressable:
        return jax.device_put(value, like.sharding, may_alias=False)
    return put_array(value, like.sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
