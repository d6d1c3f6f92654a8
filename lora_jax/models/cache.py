"""What a decoder's layers keep of the tokens so far, to generate the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class KeysValues(NamedTuple):
    """What attention keeps; token ``p`` of a row is in slot ``p``.

    Attributes:
      keys: ``[b, k, s, h]``; of a prompt, before `in_slots`, ``[b, t, k, h]``.
      values: the same.
    """

    keys: Array
    values: Array

    def in_slots(self, size: int) -> "KeysValues":
        """Returns a prompt's keys and values in the first of ``size`` slots."""

        def cached(array: Array) -> Array:  # [.., t, k, h] -> [.., k, s, h]
            room = [(0, size - array.shape[-3]), (0, 0)]
            array = array.swapaxes(-3, -2)
            return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + room)

        return KeysValues(cached(self.keys), cached(self.values))


class Recurrent(NamedTuple):
    """What a layer without attention keeps; its size doesn't depend on the length.

    Attributes:
      inputs: the last inputs of its convolution ``[b, p, c]``.
      state: of a Gated DeltaNet ``[b, n, h, u]`` float32, or ().
    """

    inputs: Array
    state: Any = ()


class Cache(NamedTuple):
    """What the layers keep.

    Attributes:
      layers: `KeysValues` or `Recurrent` of each layer, or () if it uses another's; one
        with a leading layer axis if they are scanned.
    """

    layers: Any

    @property
    def size(self) -> int:
        """The number of slots for keys; 0 if no layer has any."""
        parts = jax.tree.leaves(self.layers, is_leaf=_has_keys)
        return next((x.keys.shape[-2] for x in parts if _has_keys(x)), 0)

    def in_slots(self, size: int) -> "Cache":
        """Returns a prompt's cache with ``size`` slots for keys."""

        def own(kept: Any) -> Any:
            return kept.in_slots(size) if _has_keys(kept) else kept

        return Cache(jax.tree.map(own, self.layers, is_leaf=_has_keys))


def _has_keys(kept: Any) -> bool:
    return isinstance(kept, KeysValues)
