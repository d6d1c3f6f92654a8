"""Moving arrays between devices and the host."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from lora_jax.array_types import PyTree
from lora_jax.parallel.mesh import put_array
from lora_jax.train.padding import is_key
from lora_jax.tree.paths import key_path, leaves_by_path

ALIGNMENT = 64  # bytes


def host_leaves(tree: PyTree, *, copy: bool = True) -> dict[str, np.ndarray]:
    """Returns a tree's leaves as NumPy arrays by path; PRNG keys as their data.

    Args:
      tree: a tree of arrays. Those sharded over several processes are gathered, so all
        processes must call this.
      copy: if False, the arrays may be views of the device buffers (as on CPU), which
        are invalid once the originals are donated.
    """
    convert = np.array if copy else np.asarray

    def fetch(leaf: Any) -> np.ndarray:
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        is_spread = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return convert(process_allgather(leaf, tiled=True) if is_spread else leaf)

    return {path: fetch(leaf) for path, leaf in leaves_by_path(tree).items()}


def place(leaves: dict[str, np.ndarray], like: PyTree) -> PyTree:
    """Inverts `host_leaves`, with structure, key types and shardings of ``like``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place_one(leaves[key_path(path)], leaf), like
    )


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialised array that `jax.device_put` doesn't copy on CPU.

    XLA requires buffers aligned to `ALIGNMENT`, which NumPy's are not.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def leaf_summary(leaf: np.ndarray) -> list[Any]:
    """Returns a leaf's shape, dtype and CRC-32: ``[[3, 2], "float32", 1234]``."""
    return [list(leaf.shape), str(leaf.dtype), zlib.crc32(leaf.tobytes())]


def count_not_finite(array: np.ndarray) -> int:
    """Counts NaN and infinite values; values too large for float32 are infinite."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return 0
    with np.errstate(over="ignore"):
        return int(np.sum(~np.isfinite(array.astype(np.float32))))


def _place_one(value: np.ndarray, like: jax.Array) -> jax.Array:
    if is_key(like):
        data = _place_one(value, jax.random.key_data(like))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    if not like.committed:
        return jnp.array(value)
    if like.sharding.is_fully_addressable:
        return jax.device_put(value, like.sharding, may_alias=False)
    return put_array(value, like.sharding)
