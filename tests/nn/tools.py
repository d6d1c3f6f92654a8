"""What the tests of modules share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def shapes(tree: Any) -> Any:
    """Returns the shape of every leaf, in the structure of ``tree``."""
    return jax.tree.map(jnp.shape, tree)


def key(seed: int) -> jax.Array:
    """Returns a key of the kind that compiles in a tenth of the time."""
    return jax.random.key(seed, impl="unsafe_rbg")


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Returns fixed float32 noise, without compiling anything."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(noise, jnp.float32)


def tuned(variables: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Returns variables whose biases and B are no longer zero."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key not in ("lora_b", "bias"):
            return leaf
        noise = 0.3 * generator.normal(size=leaf.shape)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def equal(a: Any, b: Any) -> bool:
    """Says whether two trees have the same structure and the same bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
