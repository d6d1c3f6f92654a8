"""Matmuls whose result XLA:TPU is to finish before it goes on.

XLA:TPU fuses what follows a large matmul into it: a norm's backward pass sums up the
gradient as it is written, the products with an activation's gradient compute that
gradient again for each of their tiles. What is fused shares the on-chip memory with the
matmul's own tiles, which become small. In the backward pass of four Llama-8B layers on
v5e that costs 19 of 249 million cycles, by the compiler's estimate
(`benchmarks/compiled.py`).
"""

import jax

from lora_jax.array_types import AnyFloat
from lora_jax.ops.target import target_platform

MIN_BYTES = 2**23  # smaller arrays stay on the chip


def fence_gradient(x: AnyFloat) -> AnyFloat:
    """Returns an array whose gradient is finished before it is used.

    Args:
      x: an array.

    Returns:
      The same array; on other platforms than TPU, ``x`` itself.
    """
    is_large = x.size * x.dtype.itemsize >= MIN_BYTES
    return _fence_gradient(x) if is_large and target_platform() == "tpu" else x


@jax.custom_vjp
def _fence_gradient(x: AnyFloat) -> AnyFloat:
    return x


_fence_gradient.defvjp(
    lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),)
)
