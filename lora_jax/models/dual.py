"""CLIP and SigLIP: an encoder of images and one of texts, with embeddings to compare.

The parameter tree (see `lora_jax.models.encoder` for the two encoders)::

    vision/..., text/...
    vision_norm/{scale,bias}                          of the class token: CLIP
    {visual_projection,text_projection}/kernel        CLIP
    vision_head/{probe,norm/{scale,bias}}             SigLIP
    vision_head/{in_proj,output,up,down}/{kernel,bias}
    text_head/{kernel,bias}                           SigLIP
    logit_scale, logit_bias                           the latter SigLIP's
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.attention.dot_product import attention
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder_parts import Head
from lora_jax.models.embeddings import Hidden, Pixels, TokenIds
from lora_jax.models.encoder import Encoder, ImageEncoder
from lora_jax.models.encoder_block import make_norm
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig

Embedded = Float[Array, "b e"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualConfig:
    """The two encoders, and how their embeddings are made.

    Attributes:
      vision: the images' encoder.
      text: the texts' encoder.
      width: numbers in an embedding.
      is_siglip: whether images are pooled by attention and texts at their last place,
        padding or not; else at the class token and the end of the text, and projected.
      end_id: the token that ends a text; None: the one of the largest id.
      padding_id: SigLIP's texts are padded with it to the longest length.
    """

    vision: ImageEncoderConfig
    text: EncoderConfig
    width: int
    is_siglip: bool = False
    end_id: int | None = None
    padding_id: int = 1

    @property
    def hidden_size(self) -> int:
        """The width of an embedding, by the name that other configs have for it."""
        return self.width

    @property
    def max_positions(self) -> int:
        """The longest text."""
        return self.text.max_positions

    @property
    def vocab_size(self) -> int:
        """Rows of the texts' table."""
        return self.text.vocab_size


class AttentionPool(nn.Module):
    """SigLIP's pooling: a learned query attends to the patches; then an MLP.

    Variables: ``probe`` ``[1, 1, d]``, ``in_proj`` (query, key and value), ``output``,
    ``norm``, ``up``, ``down``. PyTorch computes the first two with a function of its
    own, which PEFT's adapters would not reach, so ``"all-linear"`` leaves them out.
    """

    config: ImageEncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "b d"]:
        """Returns ``[b, d]`` for hidden states ``[b, t, d]``."""
        cfg, width, (b, t, _) = self.config, self.config.hidden_size, hidden.shape
        normal = nn.initializers.normal(0.02)
        probe = self.param("probe", normal, (1, 1, width)).astype(self.dtype)
        project = Head(3 * width, dtype=self.dtype, name="in_proj")
        query = jnp.broadcast_to(project(probe)[..., :width], (b, 1, width))
        pair = project(hidden)[..., width:]
        heads = (cfg.num_heads, width // cfg.num_heads)
        key, value = (x.reshape(b, t, *heads) for x in jnp.split(pair, 2, axis=-1))
        x = attention(query.reshape(b, 1, *heads), key, value).reshape(b, width)
        x = Head(width, dtype=self.dtype, name="output")(x)
        y = make_norm(cfg, self.dtype, "norm")(x)
        y = nn.Dense(cfg.mlp_size, dtype=self.dtype, name="up")(y)
        y = ACTIVATIONS[cfg.activation](y)
        return x + nn.Dense(width, dtype=self.dtype, name="down")(y)


class DualEncoder(nn.Module):
    """Encodes images and texts as vectors of one space.

    Attributes:
      config: the two encoders.
      num_labels: None; there is no head of classes.
      pooling: unused; it is here for the sake of one call for all encoders.
      dtype: dtype of the computation; embeddings are float32.

    Raises:
      ValueError: if ``num_labels`` is given.
    """

    config: DualConfig
    num_labels: int | None = None
    pooling: str = "mean"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.num_labels is not None:
            raise ValueError(
                f"num_labels must be None for a model of images and texts, which has "
                f"no head of classes; got {self.num_labels}."
            )
        super().__post_init__()

    def setup(self):
        """Creates the encoders and what makes embeddings of their outputs."""
        cfg = self.config
        self.vision = ImageEncoder(cfg.vision, self.dtype)
        self.text = Encoder(cfg.text, self.dtype)
        scalar = (1,) if cfg.is_siglip else ()
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, scalar)
        if cfg.is_siglip:
            self.vision_head = AttentionPool(cfg.vision, self.dtype)
            self.text_head = nn.Dense(cfg.width, dtype=self.dtype)
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, scalar)
        else:
            self.vision_norm = make_norm(cfg.vision, self.dtype, None)
            self.visual_projection = nn.Dense(cfg.width, False, dtype=self.dtype)
            self.text_projection = nn.Dense(cfg.width, False, dtype=self.dtype)

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        pixel_values: Pixels,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "i b"]:
        """Compares images with texts.

        Computes ``exp(logit_scale) * images textsᵀ + logit_bias`` of embeddings.

        Args:
          input_ids: token ids ``[b, t]``.
          attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding; for SigLIP
            all 1, as it sees its padding.
          pixel_values: normalised images ``[i, c, y, x]``.
          deterministic: False turns on adapter dropout; the model itself has none.

        Returns:
          Logits ``[i, b]`` float32, a row for each image.
        """
        images = self.embed_image(pixel_values)
        texts = self.embed(input_ids, attention_mask)
        scale = jnp.exp(self.logit_scale.astype(jnp.float32))
        logits = scale * jnp.einsum("ie,be->ib", images, texts, precision="highest")
        if not self.config.is_siglip:
            return logits
        return logits + self.logit_bias.astype(jnp.float32)

    def embed(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Embedded:
        """Returns the embeddings ``[b, e]`` of texts, of length 1; see `__call__`."""
        hidden = self.text(input_ids, attention_mask)
        if self.config.is_siglip:
            return _unit(self.text_head(hidden[:, -1]))
        place = text_end(input_ids, self.config.end_id)
        pooled = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        return _unit(self.text_projection(pooled))

    def embed_image(
        self, pixel_values: Pixels, *, deterministic: bool = True
    ) -> Embedded:
        """Returns the embeddings ``[i, e]`` of images, of length 1; see `__call__`."""
        hidden = self.vision(pixel_values)
        if self.config.is_siglip:
            return _unit(self.vision_head(hidden))
        return _unit(self.visual_projection(self.vision_norm(hidden[:, 0])))


def text_end(input_ids: TokenIds, end_id: int | None) -> Array:
    """Returns the place ``[b]`` of the first token that ends each of CLIP's texts."""
    return jnp.argmax(input_ids if end_id is None else input_ids == end_id, axis=1)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
