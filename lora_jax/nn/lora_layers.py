"""Linen's linear layers, embeddings and convolutions with LoRA.

Each takes the arguments of its `flax.linen` counterpart plus ``lora``, keeps that
layer's parameters unchanged in ``frozen``, and is bitwise equal to it until A and B are
trained.
"""

import flax.linen as nn
import jax

from lora_jax.nn.base import LoRALayer, OneInputLayer
from lora_jax.nn.layer_rules import ATTEND


class LoRADense(OneInputLayer, nn.Dense):
    """`flax.linen.Dense` with LoRA: ``y = x W0 + bias + scaling * (x A) B``.

    Attributes:
      lora: the adapter config of the whole model; the layer's path selects its part.
      deterministic: disables adapter dropout; may be given at the call instead.

    Variables: ``frozen`` (``kernel`` ``[i, o]``, ``bias`` ``[o]``), ``lora``
    (``lora_a`` ``[i, r]``, ``lora_b`` ``[r, o]``; with DoRA ``magnitude`` ``[o]``, and
    for the layers below ``[*batch, *out]``).

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax import LoRAConfig
      >>> layer = LoRADense(8, use_bias=False, lora=LoRAConfig(rank=3))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 10)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["lora"]))
      54

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1.
    """


class LoRADenseGeneral(OneInputLayer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with LoRA, over any axes.

    Attributes:
      lora: see `LoRADense`.
      deterministic: see `LoRADense`.

    Variables: ``frozen`` (``kernel`` ``[*batch, *in, *out]``, ``bias``), ``lora``
    (``lora_a`` ``[*batch, *in, r]``, ``lora_b`` ``[*batch, r, *out]``).
    """


class LoRAEinsum(LoRALayer, nn.Einsum):
    """`flax.linen.Einsum` with LoRA; labels shared by all three arrays are batch.

    Attributes:
      lora: see `LoRADense`.
      deterministic: see `LoRADense`.

    Variables: ``frozen`` (``kernel``, ``bias``), ``lora`` (``lora_a``
    ``[*batch, *in, r]``, ``lora_b`` ``[*batch, r, *out]``).
    """

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        einsum_str: str | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Applies the equation; see `flax.linen.Einsum`."""
        y = super().__call__(inputs, einsum_str)
        call = (inputs, einsum_str)
        return self._adapted(y, self._factors(*call), call, deterministic)


class LoRAConv(OneInputLayer, nn.Conv):
    """`flax.linen.Conv` with LoRA: a convolution to ``r`` channels, then 1 × 1.

    A masked convolution can't be adapted.

    Attributes:
      lora: see `LoRADense`; ``"all-linear"`` does not cover convolutions.
      deterministic: see `LoRADense`.

    Variables: ``frozen`` (``kernel`` ``[*k, i/groups, o]``, ``bias`` ``[o]``), ``lora``
    (``lora_a`` ``[*k, i, r]``, ``lora_b`` ``[r, o]``, both with a leading axis of
    groups if there are several).
    """


class LoRAEmbed(LoRALayer, nn.Embed):
    """`flax.linen.Embed` with LoRA, for both lookup and `attend` (a tied head).

    Attributes:
      lora: see `LoRADense`; ``"all-linear"`` does not cover embeddings. Dropout applies
        only in `attend`: a lookup's input is one-hot.
      deterministic: see `LoRADense`.

    Variables: ``frozen`` (``embedding`` ``[v, d]``), ``lora`` (``lora_a`` ``[v, r]``,
    ``lora_b`` ``[r, d]``).
    """

    def setup(self) -> None:
        """Declares the table, A and B."""
        super().setup()
        self.factors = self._factors()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Looks up rows ``[*b]`` of the table; see `flax.linen.Embed`."""
        y = super().__call__(inputs)
        return self._adapted(y, self.factors, (inputs,))

    def attend(self, query: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Multiplies ``[*b, d]`` by the transposed table; see `flax.linen.Embed`."""
        query = self._adapted_query(query, self.factors)
        y = super().attend(query)
        return self._adapted(y, self.factors, (query,), deterministic, ATTEND)
