"""The leaves of one adapter, and the plain A and B that they amount to.

However a method stores its adapter, what it adds to the layer is ``scaling * A B`` for
some A and B, with a magnitude or without. So the ops, merging and every file format
know LoRA (and DoRA) alone, and a method is a few lines in `Factors.plain`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.ops.contraction import DENSE, Contraction


class Factors(NamedTuple):
    """The adapter's leaves of one layer, named as in `lora_jax.names.ADAPTER_LEAVES`.

    Attributes:
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      magnitude: DoRA's ``m`` ``[*batch, *out]``, or None.
      start_a: ``A0``, where the update is ``A B - A0 B0``, or None.
      start_b: ``B0``, likewise.
      vera_d: VeRA's ``d`` ``[*batch, r, *1]``, which scales the rows of B, or None.
      vera_b: VeRA's ``b`` ``[*batch, 1, *out]``, which scales its columns, or None.
    """

    lora_a: Any
    lora_b: Any
    magnitude: Any = None
    start_a: Any = None
    start_b: Any = None
    vera_d: Any = None
    vera_b: Any = None

    def plain(self, contraction: Contraction = DENSE) -> "Factors":
        """Returns A, B and m of the LoRA or DoRA adapter with the same update.

        ``A B - A0 B0 = [A A0] [B; -B0]``, of rank ``2 r``: one product, as wide as the
        rank, whose input is read once. VeRA's ``A diag(d) B diag(b)`` is ``A B'`` with
        ``B' = d B b``, so A is as it was: the input isn't kept for a gradient of it.

        Args:
          contraction: the kernel's axes.
        """
        a, b = self.lora_a, self.lora_b
        if self.start_a is not None:
            rank_axis = -1 - len(contraction.outputs)
            a = jnp.concatenate([a, self.start_a], axis=-1)
            b = jnp.concatenate([b, -self.start_b], axis=rank_axis)
        if self.vera_d is not None:
            b = self.vera_d * b * self.vera_b
        return Factors(a, b, self.magnitude)
