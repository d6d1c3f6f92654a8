"""Disentangled attention (DeBERTa v2 and v3): scores of contents and of distances.

A table has a row for each bucket of distances. Beside ``query keyᵀ`` a score has the
query's product with the row's key ("c2p"), and the key's with the row's query ("p2c").
Which row a pair of tokens has is known when the program is compiled; only the rows that
occur are projected.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Heads = Float[Array, "b t n h"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disentangled:
    """Which scores of distances there are.

    Attributes:
      span: half the rows of the table; longer distances share the last ones.
      max_distance: the longest distance that logarithmic buckets tell apart; None: a
        bucket is one distance.
      has_c2p: whether queries meet the keys of distances.
      has_p2c: whether keys meet the queries of distances.
      is_shared: whether a layer's own query and key layers make those of distances.
      has_norm: whether the table is normalised first.
    """

    span: int
    max_distance: int | None = None
    has_c2p: bool = True
    has_p2c: bool = True
    is_shared: bool = False
    has_norm: bool = False

    @property
    def num_scores(self) -> int:
        """How many products a score is the sum of; it is divided by their root."""
        return 1 + self.has_c2p + self.has_p2c

    def rows(self, t: int) -> np.ndarray:
        """Returns the table's row ``[t, t]`` of each query (first axis) and key.

        Example:
          >>> Disentangled(span=2).rows(4)[0].tolist()  # the keys at and after a query
          [2, 1, 0, 0]
        """
        distance = np.arange(t)[:, None] - np.arange(t)
        if self.max_distance is not None:
            distance = log_buckets(distance, self.span, self.max_distance)
        return np.clip(distance + self.span, 0, 2 * self.span - 1)


def log_buckets(distance: np.ndarray, size: int, max_distance: int) -> np.ndarray:
    """Returns buckets of distances: one each up to ``size / 2``, then logarithmic.

    In float32, as in PyTorch.

    Args:
      distance: the query's position minus the key's, integers of any shape.
      size: number of buckets on either side.
      max_distance: the distance at which they end.

    Returns:
      Buckets from ``-size`` to ``size``, in the shape of ``distance``.

    Example:
      >>> log_buckets(np.array([-40, -3, 0, 2, 4, 5, 7, 12]), 8, 32).tolist()
      [-8, -3, 0, 2, 4, 5, 5, 6]
    """
    middle = size // 2
    far = np.maximum(np.abs(distance), max(middle, 1)).astype(np.float32)
    octaves = np.log(far / np.float32(max(middle, 1)))
    whole = np.log(np.float32((max_distance - 1) / max(middle, 1)))
    steps = np.ceil(octaves / whole * np.float32(middle - 1)).astype(np.int64) + middle
    is_near = np.abs(distance) <= middle
    return np.where(is_near, distance, steps * np.sign(distance))


def distance_scores(
    config: Disentangled,
    query: Heads,
    key: Heads,
    table: Float[Array, "p d"],
    project: Callable[[str, Array], Float[Array, "p n h"]],
) -> Float[Array, "b n t t"]:
    """Returns the scores of distances, to be added to those of contents.

    Computes ``(q_t · K[r] + k_s · Q[r]) / √(m h)`` for ``r = rows[t, s]``, where ``K``
    and ``Q`` are the table's keys and queries and ``m`` is ``num_scores``.

    Args:
      config: which scores there are.
      query: ``[b, t, n, h]``.
      key: ``[b, t, n, h]``.
      table: a row for each bucket.
      project: makes the heads of rows, given "query" or "key".

    Returns:
      ``[b, n, t, t]`` float32: head, query, key.
    """
    rows = config.rows(query.shape[1])
    first = int(rows.min())
    used = table[first : int(rows.max()) + 1]
    rows = jnp.asarray(rows - first)[None, None]  # [1, 1, t, t]
    total = jnp.zeros((), jnp.float32)
    for is_there, x, name in (
        (config.has_c2p, query, "key"),
        (config.has_p2c, key, "query"),
    ):
        if not is_there:
            continue
        each = jnp.einsum(
            "btnh,pnh->bntp",
            *(x, project(name, used)),
            preferred_element_type=jnp.float32,
        )
        if name == "key":
            total += jnp.take_along_axis(each, rows, axis=-1)
        else:
            found = jnp.take_along_axis(each, rows.swapaxes(-1, -2), axis=-1)
            total += found.swapaxes(-1, -2)
    return total / (config.num_scores * query.shape[-1]) ** 0.5
