"""Adapters of fused projections from those of their parts, and the reverse; exact.

A fused kernel has the outputs of its parts side by side. One part's update of it is the
part's A with a B that is zero for the other outputs::

    split:  A' = A                      B' = rows of B of the part
    fuse:   A' = [A_q; A_k; A_v]        B' = blockdiag(B_q, B_k, B_v)

so fusing n parts of rank r gives rank n r. DoRA's magnitudes are split and joined: each
is of one output, and its norm depends on no other.
"""

from collections.abc import Sequence

import numpy as np

from lora_jax.interop.external import ExternalFactors


def split_factors(
    whole: ExternalFactors, sizes: Sequence[int]
) -> list[ExternalFactors]:
    """Returns the adapters of the parts of a fused projection.

    Args:
      whole: of the fused one.
      sizes: outputs of each part, in order.

    Returns:
      One adapter a part; they share A.

    Raises:
      ValueError: if the sizes don't add up to the outputs.

    Example:
      >>> whole = ExternalFactors(np.ones((1, 2)), np.arange(3.0)[:, None], 1.0, 1.0)
      >>> [part.b.ravel().tolist() for part in split_factors(whole, (2, 1))]
      [[0.0, 1.0], [2.0]]
    """
    if sum(sizes) != whole.b.shape[0]:
        raise ValueError(
            f"B must be [{sum(sizes)}, r] to be split into {list(sizes)} outputs; got "
            f"{list(whole.b.shape)}."
        )
    ends = np.cumsum(sizes)[:-1]
    m = whole.magnitude
    none = [None] * len(sizes)
    magnitudes = none if m is None else np.split(m, ends)
    return [
        whole._replace(b=b, magnitude=magnitude)
        for b, magnitude in zip(np.split(whole.b, ends), magnitudes, strict=True)
    ]


def drop_zero_ranks(factors: ExternalFactors, *, rslora: bool) -> ExternalFactors:
    """Leaves out the ranks whose column of B is zero; exact.

    After `split_factors`, this undoes `fuse_factors`.

    Args:
      factors: of one module.
      rslora: whether the scaling is ``alpha / sqrt(rank)``.

    Returns:
      An adapter of the ranks that have an effect; the same one if none or all have.

    Example:
      >>> factors = ExternalFactors(np.ones((2, 3)), np.array([[0.0, 2.0]]), 0.5, 1.0)
      >>> lean = drop_zero_ranks(factors, rslora=False)
      >>> lean.a.shape, lean.b.tolist(), lean.scaling, lean.alpha
      ((1, 3), [[2.0]], 0.5, 0.5)
    """
    kept = np.flatnonzero(factors.b.any(axis=0))
    if len(kept) in (0, factors.rank):
        return factors
    root = len(kept) ** 0.5 if rslora else len(kept)
    return factors._replace(
        a=factors.a[kept], b=factors.b[:, kept], alpha=factors.scaling * root
    )


def fuse_factors(
    parts: Sequence[ExternalFactors | None], sizes: Sequence[int], *, rslora: bool
) -> ExternalFactors:
    """Returns the adapter of a fused projection.

    Args:
      parts: adapters of its parts, in order; None for a part that has none.
      sizes: outputs of each part.
      rslora: whether the scaling is ``alpha / sqrt(rank)``.

    Returns:
      One adapter, of the sum of the ranks. Where the parts' scalings differ, their
      ratio is in B, rounded once.

    Raises:
      ValueError: if a part's B has another size, or, with DoRA, a part is missing.

    Example:
      >>> part = ExternalFactors(np.ones((1, 2)), np.full((1, 1), 3.0), 2.0, 2.0)
      >>> fuse_factors([part, None, part], (1, 1, 1), rslora=False).b.tolist()
      [[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]]
    """
    there = [part for part in parts if part is not None]
    wrong = [
        f"B must be [{size}, r]; got {list(part.b.shape)}"
        for part, size in zip(parts, sizes, strict=True)
        if part is not None and part.b.shape[0] != size
    ]
    has_magnitude = any(part.magnitude is not None for part in there)
    if has_magnitude and len(there) < len(parts):
        wrong.append(
            "with DoRA every part must have an adapter, since a magnitude always acts"
        )
    if wrong:
        raise ValueError(f"the parts can't be fused: {'; '.join(wrong)}.")
    rank = sum(part.rank for part in there)
    root = rank**0.5 if rslora else rank
    alpha = there[0].scaling * root
    scaling = alpha / root
    b = np.zeros((sum(sizes), rank), np.float32)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            ratio = np.float32(part.scaling / there[0].scaling)
            b[row : row + size, column : column + part.rank] = part.b * ratio
            column += part.rank
        row += size
    return ExternalFactors(
        a=np.concatenate([part.a for part in there]),
        b=b,
        scaling=scaling,
        alpha=alpha,
        magnitude=np.concatenate(
            [p.magnitude for p in there if p.magnitude is not None]
        )
        if has_magnitude
        else None,
    )
