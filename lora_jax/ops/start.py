"""A and B that start from W0: PiSSA, OLoRA, LoRA-GA; and the orthogonal start.

These methods start with ``A0 B0 ≠ 0`` and, in their papers, subtract ``scaling A0 B0``
from W0, so that the layer starts as it was. Here W0 stays as it is and the update is
the difference from the start::

    y = x W0 + scaling * (x A B - x A0 B0),     W = W0 + scaling * (A B - A0 B0)

It is the same layer, with the same gradients of A and B. W0 keeps its bits and its
fingerprint, in bfloat16 nothing of it is rounded away, several adapters can share it,
and the adapter is a LoRA of rank ``2 r`` for anybody's copy of the base:
``[A A0] [B; -B0]``, see `lora_jax.ops.factors`.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.ops.contraction import DENSE, Contraction, Shape
from lora_jax.ops.factors import Factors
from lora_jax.ops.init import init_adapter
from lora_jax.ops.low_rank import OVERSAMPLING, split_axes
from lora_jax.ops.vera import vera_factors

GAMMA = 16.0  # of LoRA-GA's paper and of PEFT


def init_factors(
    key: PRNGKey,
    kernel: AnyFloat,
    rank: int,
    *,
    init: str = "uniform",
    scaling: float = 1.0,
    contraction: Contraction = DENSE,
    one_hot: bool = False,
) -> Factors:
    """Initialises the factors of one layer by the method's name.

    Args:
      key: PRNG key; see `lora_jax.ops.init.path_key`.
      kernel: ``W0``.
      rank: ``r``.
      init: see `LoRAConfig.init`; with VeRA ``"vera_seed_7"``, by `LoRAConfig.start`.
      scaling: the factor before ``A B``.
      contraction: the kernel's axes.
      one_hot: whether the input is one-hot (an embedding).

    Returns:
      A and B; where they start from W0 their copies ``start_a`` and ``start_b``; of
      VeRA its vectors.

    Raises:
      ValueError: if the rank doesn't suit the kernel or ``init`` the layer.
    """
    if init == "orthogonal":
        if one_hot:
            raise ValueError(
                "init must be 'uniform' or 'gaussian' for an embedding, whose A is zero"
                "; got 'orthogonal', whose A would change the vectors of unseen tokens."
            )
        return Factors(*orthogonal_factors(key, kernel.shape, rank, contraction))
    options: dict[str, Any] = {"contraction": contraction}
    if found := re.fullmatch(r"vera_seed_(\d+)", init):
        return vera_factors(kernel.shape, rank, seed=int(found[1]), **options)
    if init == "lora_ga":  # until `lora_ga_init` has seen data
        a, b = init_adapter(key, kernel.shape, rank, **options)
        return Factors(a, b, start_a=a, start_b=b)
    if init == "olora":
        a, b = olora_factors(kernel, rank, **options)
    elif init == "pissa":
        a, b = pissa_factors(kernel, rank, scaling=scaling, **options)
    elif found := re.fullmatch(r"pissa_niter_(\d+)", init):
        given = (kernel, rank, key, int(found[1]))
        a, b = randomized_pissa_factors(*given, scaling=scaling, **options)
    else:
        drawn = "uniform" if init == "eva" else init  # until `eva_init` has seen data
        options |= {"init": drawn, "one_hot": one_hot}
        return Factors(*init_adapter(key, kernel.shape, rank, **options))
    return Factors(a, b, start_a=a, start_b=b)


def pissa_factors(
    kernel: AnyFloat,
    rank: int,
    *,
    scaling: float = 1.0,
    contraction: Contraction = DENSE,
) -> tuple[AnyFloat, AnyFloat]:
    """Returns the principal singular triplets of W0 as A and B.

    ``W0 = U S Vᵀ``, ``A = U_r √(S_r / s)``, ``B = √(S_r / s) V_rᵀ``, so that ``s A B``
    is the best approximation of W0 of rank r.

    Args:
      kernel: ``W0``.
      rank: ``r``, at most the smaller side of the kernel.
      scaling: ``s``.
      contraction: the kernel's axes.

    Returns:
      ``A`` ``[*batch, *in, r]`` and ``B`` ``[*batch, r, *out]``, float32.

    Raises:
      ValueError: if the rank exceeds the smaller side of the kernel.

    Example:
      >>> a, b = pissa_factors(jnp.diag(jnp.array([4.0, 1.0])), 1, scaling=2.0)
      >>> (2 * a @ b).round(5).tolist()
      [[4.0, 0.0], [0.0, 0.0]]

    References:
      Meng et al., https://arxiv.org/abs/2404.02948, equations 2 to 4.
    """
    matrix = _matrices(kernel, rank, contraction)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return _split(u, s, vt, kernel.shape, rank, scaling, contraction)


def randomized_pissa_factors(
    kernel: AnyFloat,
    rank: int,
    key: PRNGKey,
    iterations: int,
    *,
    scaling: float = 1.0,
    contraction: Contraction = DENSE,
) -> tuple[AnyFloat, AnyFloat]:
    """Returns PiSSA's A and B from a randomized SVD, seconds where the SVD is minutes.

    Args:
      kernel: ``W0``.
      rank: ``r``, at most the smaller side of the kernel.
      key: PRNG key of the random projection.
      iterations: power iterations; 4 or more for a good approximation.
      scaling: ``s``.
      contraction: the kernel's axes.

    Returns:
      As `pissa_factors`.

    References:
      Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithm 4.4.
    """
    matrix = _matrices(kernel, rank, contraction)
    *_, i, o = matrix.shape
    transposed = matrix.swapaxes(-1, -2)

    start = jax.random.normal(key, (o, min(rank + OVERSAMPLING, i, o)), matrix.dtype)
    basis = jnp.linalg.qr(_product(matrix, start))[0]
    for _ in range(iterations):
        other = jnp.linalg.qr(_product(transposed, basis))[0]
        basis = jnp.linalg.qr(_product(matrix, other))[0]
    inner = _product(basis.swapaxes(-1, -2), matrix)
    u, s, vt = jnp.linalg.svd(inner, full_matrices=False)
    return _split(_product(basis, u), s, vt, kernel.shape, rank, scaling, contraction)


def olora_factors(
    kernel: AnyFloat, rank: int, *, contraction: Contraction = DENSE
) -> tuple[AnyFloat, AnyFloat]:
    """Returns A and B from a QR decomposition of W0.

    ``W0ᵀ = Q R``, ``A = (R_r)ᵀ``, the first r rows of R, and ``B = (Q_r)ᵀ``, whose rows
    are orthonormal.

    Args:
      kernel: ``W0``.
      rank: ``r``, at most the smaller side of the kernel.
      contraction: the kernel's axes.

    Returns:
      ``A`` ``[*batch, *in, r]`` and ``B`` ``[*batch, r, *out]``, float32.

    Raises:
      ValueError: if the rank exceeds the smaller side of the kernel.

    References:
      Büyükakyüz, https://arxiv.org/abs/2406.01775, algorithm 1, whose W is our W0ᵀ.
    """
    matrix = _matrices(kernel, rank, contraction)
    q, r = jnp.linalg.qr(matrix.swapaxes(-1, -2))
    a, b = r[..., :rank, :].swapaxes(-1, -2), q[..., :rank].swapaxes(-1, -2)
    return _shaped(a, b, kernel.shape, rank, contraction)


def gradient_factors(
    gradient: AnyFloat,
    rank: int,
    *,
    contraction: Contraction = DENSE,
    gamma: float = GAMMA,
) -> tuple[AnyFloat, AnyFloat]:
    """Returns LoRA-GA's A and B, singular vectors of the gradient of W0.

    ``G = U S Vᵀ``, ``A = c U[:, :r]``, ``B = c V[:, r:2r]ᵀ`` with
    ``c = out^(1/4) / √γ``: the paper's stable scaling.

    Args:
      gradient: of the loss with respect to ``W0``, in its shape; only its direction
        matters.
      rank: ``r``, at most half the smaller side of the kernel.
      contraction: the kernel's axes.
      gamma: ``γ``, which makes A and B small beside W0.

    Returns:
      ``A`` ``[*batch, *in, r]`` and ``B`` ``[*batch, r, *out]``, float32.

    Raises:
      ValueError: if ``2 r`` exceeds the smaller side of the kernel.

    References:
      Wang, Yu and Li, https://arxiv.org/abs/2407.05000, equation 11 and section 3.4.
      The authors' code scales A and B so; PEFT 0.21 leaves A and multiplies B by the
      gradient's singular values too.
    """
    matrix = _matrices(gradient, 2 * rank, contraction)
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    c = matrix.shape[-1] ** 0.25 / gamma**0.5
    a, b = c * u[..., :rank], c * vt[..., rank : 2 * rank, :]
    return _shaped(a, b, gradient.shape, rank, contraction)


def orthogonal_factors(
    key: PRNGKey, kernel_shape: Shape, rank: int, contraction: Contraction = DENSE
) -> tuple[AnyFloat, AnyFloat]:
    """Returns random A and B with ``A B = 0``, from the rows of an orthogonal matrix.

    ``A = X Q_even / 10``, ``B = Q_oddᵀ Y / 10`` with standard normal ``X`` ``[i, r/2]``
    and ``Y`` ``[r/2, o]``, and the rows of a random orthogonal Q ``[r, r]`` in turn.

    Args:
      key: PRNG key.
      kernel_shape: shape of ``W0``.
      rank: ``r``, even.
      contraction: the kernel's axes.

    Returns:
      ``A`` ``[*batch, *in, r]`` and ``B`` ``[*batch, r, *out]``, float32.

    Raises:
      ValueError: if the rank is odd.

    References:
      PEFT's ``init_lora_weights="orthogonal"``;
      https://datta0.github.io/posts/rethink-lora-init.
    """
    if rank % 2:
        raise ValueError(f"rank must be even for orthogonal factors; got {rank}.")
    batch, inputs, outputs = contraction.split(kernel_shape)
    i, o = math.prod(inputs), math.prod(outputs)
    keys = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (*batch, rank, rank)))[0]
    x = jax.random.normal(keys[1], (*batch, i, rank // 2))
    y = jax.random.normal(keys[2], (*batch, rank // 2, o))
    a = _product(x, q[..., 0::2, :]) / 10
    b = _product(q[..., 1::2, :].swapaxes(-1, -2), y) / 10
    return _shaped(a, b, kernel_shape, rank, contraction)


def _product(left: AnyFloat, right: AnyFloat) -> AnyFloat:
    return jnp.matmul(left, right, precision="highest")


def _matrices(kernel: AnyFloat, rank: int, contraction: Contraction) -> AnyFloat:
    """Returns W0 as matrices ``[*batch, i, o]`` in float32, once the rank fits."""
    smaller = min(contraction.matrix_size(kernel.shape))
    if not 1 <= rank <= smaller:
        raise ValueError(
            f"rank must be from 1 to {smaller}, the smaller side of a kernel of shape "
            f"{kernel.shape}, to start from its factors; got {rank}. Lower it, for one "
            "layer by rank_pattern."
        )
    dtype = jnp.promote_types(jnp.float32, kernel.dtype)
    return split_axes(jnp.asarray(kernel, dtype), contraction)


def _split(u, s, vt, kernel_shape, rank, scaling, contraction):
    """Splits the singular values between A and B."""
    root = jnp.sqrt(s[..., :rank] / scaling)
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
    return _shaped(a, b, kernel_shape, rank, contraction)


def _shaped(a, b, kernel_shape, rank, contraction):
    shapes = contraction.factor_shapes(kernel_shape, rank)
    return a.reshape(shapes[0]), b.reshape(shapes[1])
