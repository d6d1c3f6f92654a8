"""Large matmuls that XLA:TPU is to compile by themselves.

XLA:TPU fuses what comes before and after a large matmul into it: the adapter's update
is added as the result is written, a norm's backward pass sums it up, the products with
an activation's gradient compute that gradient again for each of their tiles. What is
fused shares the on-chip memory with the matmul's own tiles, which become small.

By the compiler's estimate (`benchmarks/compiled.py`), fences around the base's products
and behind the activation take a step of four Llama-8B layers on v5e from 249 to 230
million cycles; one of its MLPs, adapters included, from 42.5 to 34.6.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.ops.target import target_platform

MIN_BYTES = 2**23  # smaller arrays stay on the chip


def fence_output(y: AnyFloat) -> AnyFloat:
    """Returns a matmul's result, finished before it is used.

    Args:
      y: an array.

    Returns:
      The same array; on other platforms than TPU, ``y`` itself.
    """
    return _fence_output(y) if _needs_fence(y) else y


def fence_gradient(x: Any) -> Any:
    """Returns an array whose gradient is finished before it is used.

    Args:
      x: an array; one of integers has no gradient.

    Returns:
      The same array; on other platforms than TPU, ``x`` itself.
    """
    return _fence_gradient(x) if _needs_fence(x) else x


def _needs_fence(x: Any) -> bool:
    if target_platform() != "tpu" or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    return x.size * x.dtype.itemsize >= MIN_BYTES


@jax.custom_vjp
def _fence_output(y: AnyFloat) -> AnyFloat:
    return jax.lax.optimization_barrier(y)


_fence_output.defvjp(
    # Not `_fence_output`: forward-over-reverse differentiates this function.
    lambda y: (jax.lax.optimization_barrier(y), None),
    lambda _, dy: (dy,),
)


@jax.custom_vjp
def _fence_gradient(x: AnyFloat) -> AnyFloat:
    return x


_fence_gradient.defvjp(
    lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),)
)
