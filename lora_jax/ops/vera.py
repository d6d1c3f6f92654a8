"""VeRA: A and B random, frozen and shared by all layers; two vectors trained.

``W = W0 + scaling * A diag(d) B diag(b)``. The layers of a model take the first rows of
one A and the first columns of one B, as many as they have inputs and outputs (A also at
the scale of its own fan-in), so that layers of one size have the same A and B.
"""

import math

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.names import VERA_B, VERA_D
from lora_jax.ops.contraction import DENSE, Contraction, Shape
from lora_jax.ops.factors import Factors

D_INITIAL = 0.1  # of VeRA's paper and of PEFT


def vera_factors(
    kernel_shape: Shape, rank: int, *, seed: int = 0, contraction: Contraction = DENSE
) -> Factors:
    """Draws VeRA's A and B, and starts its vectors.

    ``A`` is ``U(±√(6 / fan_in))``, ``B`` is ``U(±√(6 / r))``, ``d = 0.1`` and
    ``b = 0``, which makes the start silent.

    Args:
      kernel_shape: shape of ``W0``.
      rank: ``r``.
      seed: of A and B, the same for all layers of a model.
      contraction: the kernel's axes; all of a batch (experts) have the same A and B.

    Returns:
      ``A`` ``[*batch, *in, r]``, ``B`` ``[*batch, r, *out]``, ``d`` ``[*batch, r, *1]``
      and ``b`` ``[*batch, 1, *out]``, float32.

    Raises:
      ValueError: if the rank is below 1.

    Example:
      >>> small, large = (vera_factors((i, 4), 3, seed=7) for i in (2, 8))
      >>> bool(jnp.allclose(small.lora_a, 2 * large.lora_a[:2])), small.vera_d.shape
      (True, (3, 1))

    References:
      Kopiczko, Blankevoort and Asano, https://arxiv.org/abs/2310.11454, equation 2 and
      section 3.2. Its W is our W0ᵀ, its A and B our Aᵀ and Bᵀ; it has no scaling, which
      is 1 for ``alpha = rank``.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}.")
    fan_in, fan_out = contraction.matrix_size(kernel_shape)
    of_a, of_b = jax.random.split(jax.random.key(seed))
    a = math.sqrt(6 / fan_in) * _rows(of_a, fan_in, rank)
    b = math.sqrt(6 / rank) * _rows(of_b, fan_out, rank).T
    a_shape, b_shape = contraction.factor_shapes(kernel_shape, rank)
    batch, inputs, outputs = contraction.split(kernel_shape)
    shapes = vera_shapes(b_shape, contraction)
    return Factors(
        jnp.broadcast_to(a.reshape(*inputs, rank), a_shape),
        jnp.broadcast_to(b.reshape(rank, *outputs), (*batch, rank, *outputs)),
        vera_d=jnp.full(shapes[VERA_D], D_INITIAL),
        vera_b=jnp.zeros(shapes[VERA_B]),
    )


def vera_shapes(
    b_shape: Shape, contraction: Contraction = DENSE
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of d and b by name: B's, with 1 for the axes they lack.

    They have B's axes, so that they scale it as they are, and B's place in a scan.
    """
    axis = len(b_shape) - 1 - len(contraction.outputs)
    batch, (rank, *outputs) = b_shape[:axis], b_shape[axis:]
    return {
        VERA_D: (*batch, rank, *(1 for _ in outputs)),
        VERA_B: (*batch, 1, *outputs),
    }


def _rows(key: PRNGKey, count: int, rank: int) -> AnyFloat:
    """Draws ``U(±1)`` ``[count, r]``, a row independent of how many there are."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(count))
    return jax.vmap(lambda key: jax.random.uniform(key, (rank,), minval=-1.0))(keys)
