"""The modules of sentence-transformers after the transformer, as one Linen module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.embeddings import Hidden, TokenIds
from lora_jax.models.pooling import sentence_pool
from lora_jax.models.sentence_config import DenseStep, SentenceConfig
from lora_jax.nn.layer_rules import register_layer

DENSE = "dense_"


class SentenceDense(nn.Dense):
    """A dense layer after the pooling.

    ``"all-linear"`` leaves it out: sentence-transformers gives adapters to the
    transformer only. Targets may name it.
    """


register_layer(SentenceDense, "...i,io->...o", kind="head")


class SentenceHead(nn.Module):
    """Pools hidden states, and applies dense layers and a normalisation, in float32.

    Variables: ``dense_{i}/{kernel,bias}``, with ``i`` from 0.

    Attributes:
      config: what is applied, in which order.
    """

    config: SentenceConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: TokenIds) -> Float[Array, "b e"]:
        """Returns embeddings.

        Args:
          hidden: hidden states ``[b, t, d]``.
          mask: ``[b, t]``, 1 for real tokens and 0 for padding; at least one per row.

        Returns:
          Embeddings ``[b, e]`` float32.
        """
        modes = self.config.poolings
        pooled = [sentence_pool(hidden, mask, mode) for mode in modes]
        x, number = jnp.concatenate(pooled, axis=-1), 0
        for step in self.config.steps:
            if isinstance(step, DenseStep):
                x = SentenceDense(
                    step.width, step.has_bias, jnp.float32, name=f"{DENSE}{number}"
                )(x)
                if step.activation is not None:
                    activation = {**ACTIVATIONS, "tanh": jnp.tanh}[step.activation]
                    x = activation(x)
                number += 1
            else:
                squares = jnp.sum(x * x, axis=-1, keepdims=True)
                x = x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
        return x
