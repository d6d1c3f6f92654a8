"""Activation functions by the names that Hugging Face configs give them."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from lora_jax.ops.fence import fence_gradient

Activation = Callable[[Array], Array]


def exact_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Computes ``x * Phi(x)`` with the error function, as BERT was trained.

    ``jax.nn.gelu(approximate=False)`` computes the same with ``erfc``, which XLA
    evaluates by two expansions and a select; ``erf``, as in PyTorch, is cheaper.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{y:.4f}" for y in exact_gelu(jnp.array([0.0, 1.0]))]
      ['0.0000', '0.8413']
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def tanh_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Computes the tanh approximation of GELU; see `exact_gelu`."""
    return nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Computes ``x * sigmoid(1.702 x)``, as CLIP was trained; see `exact_gelu`."""
    return x * jax.nn.sigmoid(1.702 * x)


# "gelu_new" and "gelu_fast" are the tanh approximation too.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": exact_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def gate(
    activation: Activation, x: Float[Array, "*b f"], up: Float[Array, "*b f"]
) -> Float[Array, "*b f"]:
    """Computes ``activation(x) * up``, saving only x and up for the backward pass."""
    x, up = fence_gradient(x), fence_gradient(up)
    return jax.checkpoint(lambda x, up: activation(x) * up)(x, up)
