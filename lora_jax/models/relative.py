"""Relative positions in buckets, each with a bias of the attention scores (T5)."""

import numpy as np


def relative_buckets(
    distance: np.ndarray, num_buckets: int, *, far: int = 128, is_causal: bool = False
) -> np.ndarray:
    """Buckets of distances between a query and the keys that it sees.

    The first half of a side's buckets is one a distance, the second half grows
    logarithmically up to the distance ``far``, in float32 as in PyTorch. Half of all
    buckets are for keys after the query, unless ``is_causal``.

    Args:
      distance: the key's position minus the query's, integers of any shape.
      num_buckets: number of buckets; even unless ``is_causal``.
      far: the least distance that has the last bucket.
      is_causal: whether all buckets are for keys before the query; the distance of
        later ones counts as 0.

    Returns:
      The buckets, in the shape of ``distance``.

    Example:
      >>> relative_buckets(np.array([-500, -1, 0, 1, 8, 64]), 32).tolist()
      [15, 1, 0, 17, 24, 30]
      >>> relative_buckets(np.array([-500, -64, -9, 1]), 32, is_causal=True).tolist()
      [31, 26, 9, 0]

    References:
      Raffel et al., https://arxiv.org/abs/1910.10683, section 2.1.
    """
    size = np.maximum(-distance, 0) if is_causal else np.abs(distance)
    side = num_buckets if is_causal else num_buckets // 2
    exact = side // 2
    octaves = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact))
    steps = octaves / np.float32(np.log(far / exact)) * np.float32(side - exact)
    wide = np.minimum(exact + steps.astype(np.int32), side - 1)
    buckets = np.where(size < exact, size, wide)
    return buckets if is_causal else buckets + side * (distance > 0)
