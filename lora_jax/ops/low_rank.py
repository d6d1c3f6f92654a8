"""The best factors ``A B`` of a given rank for a matrix, or for a product of factors.

``M ≈ A B`` with ``A = U √S`` and ``B = √S Vᵀ`` from the largest singular values of M:
no other pair of that rank is closer in the Frobenius norm (Eckart and Young). Computed
on the host in float64, since this runs once per adapter and not in a training step.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.ops.contraction import Contraction

EXACT = 1024  # matrices with a smaller side get the whole SVD, in seconds
OVERSAMPLING, ITERATIONS = 16, 6


class LowRank(NamedTuple):
    """Factors of a matrix, or of a stack of them.

    Attributes:
      a: ``A`` ``[*batch, i, r]``.
      b: ``B`` ``[*batch, r, o]``.
      error: ``‖M - A B‖ / ‖M‖`` over the whole stack, 0 for a zero matrix.
    """

    a: np.ndarray
    b: np.ndarray
    error: float


def as_matrices(kernel: Any, contraction: Contraction) -> np.ndarray:
    """Reshapes a kernel to one matrix ``[*batch, i, o]`` for each batch element.

    The inverse of `lora_jax.ops.merge.delta_kernel`'s layout.

    Args:
      kernel: in its own layout, with scanned axes among the contraction's batch axes.
      contraction: the roles of its axes.

    Returns:
      A float64 array.
    """
    array = np.asarray(jnp.asarray(kernel, jnp.float32), np.float64)
    return split_axes(array, contraction)


def split_axes(array: Any, contraction: Contraction) -> Any:
    """As `as_matrices`, for an array of NumPy or JAX in its own dtype."""
    batch, inputs, outputs = contraction.split(array.shape)
    order = (*contraction.batch, *contraction.inputs, *contraction.outputs)
    array = array.transpose(order)
    if contraction.groups > 1:  # [*batch, *in, o] -> [*batch, g, *in, o/g]
        array = array.reshape(*array.shape[:-1], contraction.groups, -1)
        axes = list(range(array.ndim))
        axes.insert(len(contraction.batch), axes.pop(-2))
        array = array.transpose(axes)
    i, o = (int(np.prod(sizes)) for sizes in (inputs, outputs))
    return array.reshape(*batch, i, o)


def best_factors(matrix: np.ndarray, rank: int) -> LowRank:
    """Returns the closest ``A B`` to a matrix.

    Args:
      matrix: ``M`` ``[*batch, i, o]``. If both sides are above `EXACT`, the SVD is a
        randomized one with `ITERATIONS` power iterations; ``error`` is always the true
        one.
      rank: ``r``; above ``min(i, o)`` the factors are padded with zeros.

    Returns:
      The factors and their error.

    Example:
      >>> found = best_factors(np.diag([4.0, 2.0, 0.0]), rank=1)
      >>> (found.a @ found.b).round(6)[0].tolist(), round(found.error, 4)
      ([4.0, 0.0, 0.0], 0.4472)

    References:
      Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithm 4.4.
    """
    kept = min(rank, *matrix.shape[-2:])
    if min(matrix.shape[-2:]) <= EXACT:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = _randomized_svd(matrix, kept)
    best = (u[..., :kept] * s[..., None, :kept]) @ vt[..., :kept, :]
    left = np.linalg.norm(matrix - best)
    return _factors(u, s, vt, rank, left, np.linalg.norm(matrix))


def truncate_factors(a: np.ndarray, b: np.ndarray, rank: int) -> LowRank:
    """Returns the closest product of rank ``rank`` to ``A B``, without forming it.

    ``A = Q R`` and ``Bᵀ = P T`` leave the SVD of the small matrix ``R Tᵀ``.

    Args:
      a: ``A`` ``[*batch, i, q]``.
      b: ``B`` ``[*batch, q, o]``.
      rank: of the result; above ``q`` the factors are padded with zeros.

    Returns:
      The factors and their error.
    """
    q, r = np.linalg.qr(np.asarray(a, np.float64))
    p, t = np.linalg.qr(np.asarray(b, np.float64).swapaxes(-1, -2))
    u, s, vt = np.linalg.svd(r @ t.swapaxes(-1, -2), full_matrices=False)
    left = np.linalg.norm(s[..., rank:])
    return _factors(q @ u, s, vt @ p.swapaxes(-1, -2), rank, left, np.linalg.norm(s))


def _factors(u, s, vt, rank: int, left: Any, whole: Any) -> LowRank:
    """Splits the singular values evenly, and pads to the rank."""
    root = np.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    missing = rank - root.shape[-1]
    still = [(0, 0)] * (a.ndim - 2)
    a = np.pad(a, [*still, (0, 0), (0, missing)])
    b = np.pad(b, [*still, (0, missing), (0, 0)])
    return LowRank(a, b, float(left / whole) if whole else 0.0)


def _randomized_svd(matrix: np.ndarray, rank: int):
    """Approximates the largest singular triplets by subspace iteration."""
    size = min(rank + OVERSAMPLING, *matrix.shape[-2:])
    transposed = matrix.swapaxes(-1, -2)
    start = np.random.default_rng(0).standard_normal((matrix.shape[-1], size))
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(transposed @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.swapaxes(-1, -2) @ matrix, full_matrices=False)
    return basis @ u, s, vt
