"""A fingerprint of the base model, so that an adapter can identify its base."""

import functools
import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.array_types import PyTree
from lora_jax.tree.paths import leaves_by_path

SAMPLES = 1024
_VERSION = "1"


def fingerprint(tree: PyTree) -> str:
    """Hashes the paths, shapes, dtypes and a sample of the values of a tree of arrays.

    Reads at most 2,047 evenly spaced elements of each leaf, so it is cheap for a base
    of any size. It distinguishes models but is not a checksum: a change between two
    sampled elements is not detected.

    Args:
      tree: the frozen base as the model uses it, NumPy or JAX arrays. Key order and
        devices don't matter. For arrays sharded over several processes, all of them
        must call this.

    Returns:
      ``"1-"``, where 1 is the version of the scheme, and 32 hexadecimal digits.

    Raises:
      ValueError: if the tree has no leaves.

    Example:
      >>> a = fingerprint({"kernel": np.ones((3, 2), np.float32)})
      >>> a == fingerprint({"kernel": jax.numpy.ones((3, 2))})
      True
      >>> a == fingerprint({"kernel": np.zeros((3, 2), np.float32)})
      False
    """
    leaves = sorted(leaves_by_path(tree).items())
    if not leaves:
        raise ValueError("fingerprint needs a tree with at least 1 leaf; got 0.")
    digest = hashlib.sha256()
    for path, leaf in leaves:
        digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
        digest.update(_sample(leaf).tobytes())
    return f"{_VERSION}-{digest.hexdigest()[:32]}"


def _sample(leaf: np.ndarray | jax.Array) -> np.ndarray:
    """Returns every n-th element, with odd n so that samples vary in column."""
    stride = (leaf.size // SAMPLES) | 1
    place = leaf.sharding if isinstance(leaf, jax.Array) else None
    if isinstance(place, NamedSharding):
        # On a mesh, sample without gathering the whole array on any device.
        elements = np.unravel_index(np.arange(0, leaf.size, stride), leaf.shape)
        leaf = _taker(NamedSharding(place.mesh, PartitionSpec()))(leaf, elements)
        stride = 1
    elif place is not None and next(iter(place.device_set)).platform == "cpu":
        leaf = np.asarray(leaf)  # a view: neither copies nor compiles
    sample = np.asarray(leaf.reshape(-1)[::stride])
    return sample.astype(sample.dtype.newbyteorder("<"), copy=False)


@functools.cache
def _taker(place: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda leaf, elements: leaf[elements], out_shardings=place)
