"""The expert of a mixture that every token goes through."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.names import LINEAR, ROUTER
from lora_jax.nn.layer_rules import register_layer


class Opening(nn.Dense):
    """The score that weighs the shared expert.

    Like the router, ``"all-linear"`` leaves it out; a target may name it.
    """


register_layer(Opening, "...i,io->...o", kind=ROUTER)


class SharedExpert(nn.Module):
    """Computes ``sigmoid(x W_opening) * (act(x W_gate) * x W_up) W_down``.

    Attributes:
      size: width inside it.
      activation: Hugging Face's name of its activation.
      dtype: dtype of the computation.
    """

    size: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""

        def dense(name: str, x: Array, width: int) -> Array:
            layer = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
            return checkpoint_name(layer(x), LINEAR)

        opening = Opening(1, use_bias=False, dtype=self.dtype, name="opening")
        both = (dense(name, x, self.size) for name in ("gate", "up"))
        inner = gate(ACTIVATIONS[self.activation], *both)
        return nn.sigmoid(opening(x)) * dense("down", inner, x.shape[-1])
