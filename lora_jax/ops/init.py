"""Initial values of A and B, from a key and a path.

``A ~ U(±1/√fan_in)`` and ``B = 0``, so a layer starts equal to its base. The fan-in
counts only the input axes, not the batch (experts, scanned layers).

For an embedding the roles are swapped: ``A = 0``, with one row per token, and
``B ~ U(±1/√d)``, as if the table were the kernel of the tied head ``d -> v``. Tokens
that never occur in training then keep their vectors; with a random A, any update of B
would move every token in a random direction.
"""

import math
import warnings
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.ops.contraction import DENSE, Contraction, Shape


def path_key(key: PRNGKey, path: str) -> PRNGKey:
    """Returns the PRNG key of one ``/``-joined path.

    It depends only on ``key`` and ``path``, so adapting one more layer does not change
    any other layer's values.
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init_adapter(
    key: PRNGKey,
    kernel_shape: Shape,
    rank: int,
    *,
    contraction: Contraction = DENSE,
    init: Literal["uniform", "gaussian"] = "uniform",
    one_hot: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> tuple[AnyFloat, AnyFloat]:
    """Initialises A randomly and B to zero (for an embedding, the reverse).

    Args:
      key: PRNG key; see `path_key`.
      kernel_shape: shape of ``W0``.
      rank: ``r``, at least 1.
      contraction: the kernel's axes.
      init: ``"uniform"``: ``U(±1/√fan_in)``, variance ``1/(3 fan_in)``;
        ``"gaussian"``: ``N(0, 1/rank²)``.
      one_hot: whether the input is one-hot (an embedding): A is then zero, and B random
        with its outputs as the fan-in.
      dtype: dtype of both.

    Returns:
      ``A`` ``[*batch, *in, r]`` and ``B`` ``[*batch, r, *out]``, one of them all zeros.

    Raises:
      ValueError: if the rank is below 1 or ``init`` is unknown.

    Warns:
      UserWarning: if the rank exceeds the smaller side of the kernel: A and B then have
        more parameters than the kernel but no more expressive power.

    Example:
      >>> a, b = init_adapter(jax.random.key(0), (10, 8), rank=3)
      >>> a.shape, b.shape, a.size + b.size
      ((10, 3), (3, 8), 54)

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1; the uniform bound is
      that of its reference implementation (Kaiming uniform with a = √5). PEFT 0.21
      swaps the roles for embeddings too, with ``B ~ N(0, 1)``.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}.")
    fan_in, fan_out = contraction.matrix_size(kernel_shape)
    if rank > min(fan_in, fan_out):
        warnings.warn(
            f"rank {rank} exceeds the smaller side of a kernel of shape "
            f"{kernel_shape} ({fan_in} inputs, {fan_out} outputs).",
            stacklevel=2,
        )
    a_shape, b_shape = contraction.factor_shapes(kernel_shape, rank)
    drawn, fan = (b_shape, fan_out) if one_hot else (a_shape, fan_in)
    if init == "uniform":
        bound = 1 / math.sqrt(fan)
        factor = jax.random.uniform(key, drawn, dtype, -bound, bound)
    elif init == "gaussian":
        factor = jax.random.normal(key, drawn, dtype) / rank
    else:
        raise ValueError(f"init must be 'uniform' or 'gaussian'; got {init!r}.")
    if one_hot:
        return jnp.zeros(a_shape, dtype), factor
    return factor, jnp.zeros(b_shape, dtype)
