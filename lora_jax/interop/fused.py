"""Converts adapters between fused projections and their parts, exactly.

A fused kernel has the outputs of its parts side by side. A part's update to it is the
part's A with a B that is zero for the other outputs::

    split:  A' = A                      B' = the part's rows of B
    fuse:   A' = [A_q; A_k; A_v]        B' = blockdiag(B_q, B_k, B_v)

so fusing n parts of rank r gives rank n r. DoRA's magnitudes are split and joined: each
belongs to one output, whose norm depends on no other.
"""

from collections.abc import Sequence

import numpy as np

from lora_jax.interop.external import ExternalFactors


def split_factors(
    whole: ExternalFactors, sizes: Sequence[int]
) -> list[ExternalFactors]:
    """Splits a fused projection's adapter into parts of ``sizes`` outputs that share A.

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
    ends, m = np.cumsum(sizes)[:-1], whole.magnitude
    magnitudes = [None] * len(sizes) if m is None else np.split(m, ends)
    return [
        whole._replace(b=b, magnitude=magnitude)
        for b, magnitude in zip(np.split(whole.b, ends), magnitudes, strict=True)
    ]


def drop_zero_ranks(factors: ExternalFactors, *, rslora: bool) -> ExternalFactors:
    """Drops ranks whose column of B is zero; undoes `fuse_factors` after a split.

    Returns the factors unchanged if no column is zero, or all are.

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
    """Fuses adapters of a projection's parts into one whose rank is the sum of theirs.

    Where the parts' scalings differ, their ratio is folded into B, rounded once.

    Args:
      parts: the parts' adapters, in order; None for a part without one.
      sizes: outputs of each part.
      rslora: whether the scaling is ``alpha / sqrt(rank)``.

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
    has_dora = any(part.magnitude is not None for part in there)
    if has_dora and len(there) < len(parts):
        wrong.append(
            "with DoRA every part must have an adapter, since magnitudes always act"
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
    a = np.concatenate([part.a for part in there])
    magnitudes = [part.magnitude for part in there if part.magnitude is not None]
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    is_wide = there[0].is_wide
    return ExternalFactors(a, b, scaling, alpha, magnitude, is_wide=is_wide)
