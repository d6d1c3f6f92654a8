"""Helpers for the tests of modules."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import merge_kernel
from lora_jax.ops import Contraction


def shapes(tree: Any) -> Any:
    """Returns the shape of every leaf, in the structure of ``tree``."""
    return jax.tree.map(jnp.shape, tree)


def key(seed: int) -> jax.Array:
    """Returns a PRNG key of a kind that compiles ten times faster."""
    return jax.random.key(seed, impl="unsafe_rbg")


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Returns fixed float32 noise, without compiling anything."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(noise, jnp.float32)


def tuned(variables: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Returns variables whose biases and factors are no longer zero."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key not in ("lora_a", "lora_b", "bias") or np.any(leaf):
            return leaf
        noise = 0.3 * generator.normal(size=leaf.shape)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def equal(a: Any, b: Any) -> bool:
    """Returns whether two trees have the same structure and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@functools.cache
def initialised(layer: nn.Module, *shapes_of_inputs: tuple[int, ...]) -> Any:
    """Returns initial variables for inputs of these shapes, compiled once."""
    inputs = [normal(shape) for shape in shapes_of_inputs]
    return jax.jit(layer.init)(key(1), *inputs)


def variables_of(layer: nn.Module, *inputs: jax.Array) -> Any:
    """Returns variables whose biases and B are not zero."""
    return tuned(initialised(layer, *(x.shape for x in inputs)))


def merged_attention(variables: dict[str, Any], scaling: float = 7.0 / 3) -> Any:
    """Returns the plain parameters of attention with the adapters merged in."""
    params = dict(variables["frozen"])
    for name, factors in variables.get("lora", {}).items():
        heads_in = name == "out"
        kernel = merge_kernel(
            params[name]["kernel"],
            *(factors["lora_a"], factors["lora_b"]),
            scaling=scaling,
            contraction=Contraction((), (0, 1), (2,))
            if heads_in
            else Contraction((), (0,), (1, 2)),
        )
        params[name] = {**params[name], "kernel": kernel}
    return params
