"""The text and the image encoder of CLIP and SigLIP, each in a folder of its own.

The parameter tree is that of `lora_jax.models.encoder` under ``encoder``, and::

    image_norm/{scale,bias}                           of the class token: CLIP's images
    image_head/...                                    SigLIP's images, see `dual`
    projection/{kernel,bias}                          only with ``width``
    classifier/{kernel,bias}                          only with num_labels
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.models.dual import AttentionPool, text_end
from lora_jax.models.embeddings import Pixels, TokenIds
from lora_jax.models.encoder import Classifier, Encoder, ImageEncoder
from lora_jax.models.encoder_block import make_norm
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig

Embedded = Float[Array, "b e"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig(EncoderConfig):
    """A text encoder of CLIP or SigLIP; see `EncoderConfig`.

    Attributes:
      is_siglip: see `DualConfig`.
      width: numbers in an embedding; None: the pooled hidden state is one.
      end_id: see `DualConfig`.
      fill_id: see `DualConfig.padding_id`.
    """

    is_siglip: bool = False
    width: int | None = None
    end_id: int | None = None
    fill_id: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTowerConfig(ImageEncoderConfig):
    """An image encoder of CLIP or SigLIP; see `ImageEncoderConfig`.

    Attributes:
      is_siglip: see `DualConfig`.
      width: numbers in an embedding; None: the pooled hidden state is one.
    """

    is_siglip: bool = False
    width: int | None = None


class TextTower(Classifier):
    """A text encoder whose output is an embedding; its attributes are `Classifier`'s.

    Texts are pooled as `DualEncoder` does, whatever ``pooling`` is. Unlike there, an
    embedding has any length, as in transformers.
    """

    encoder_type: ClassVar = Encoder

    def setup(self):
        """Creates encoder, projection and head."""
        super().setup()
        if self.config.width is not None:
            bias = self.config.is_siglip
            self.projection = nn.Dense(self.config.width, bias, dtype=self.dtype)

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Embedded:
        """Returns logits ``[b, num_labels]`` float32; embeddings without a head.

        Args:
          input_ids: token ids ``[b, t]``.
          attention_mask: ``[b, t]``; see `DualEncoder`.
          deterministic: False turns on dropout.
        """
        found = self.embed(input_ids, attention_mask, deterministic=deterministic)
        return found if self.num_labels is None else self.classifier(found)

    def embed(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Embedded:
        """Returns the embeddings ``[b, e]`` of texts, float32; see `__call__`."""
        cfg = self.config
        hidden = self.encoder(input_ids, attention_mask, deterministic=deterministic)
        if cfg.is_siglip:
            x = hidden[:, -1]
        else:
            place = text_end(input_ids, cfg.end_id)[:, None, None]
            x = jnp.take_along_axis(hidden, place, axis=1)[:, 0]
        x = x if cfg.width is None else self.projection(x)
        return x.astype(jnp.float32)


class ImageTower(Classifier):
    """An image encoder whose output is an embedding; see `TextTower`."""

    encoder_type: ClassVar = ImageEncoder

    def setup(self):
        """Creates encoder, pooling, projection and head."""
        super().setup()
        cfg = self.config
        if cfg.is_siglip:
            self.image_head = AttentionPool(cfg, self.dtype)
        else:
            self.image_norm = make_norm(cfg, self.dtype, None)
        if cfg.width is not None:
            self.projection = nn.Dense(cfg.width, False, dtype=self.dtype)

    def __call__(self, pixel_values: Pixels, *, deterministic: bool = True) -> Embedded:
        """Returns logits ``[b, num_labels]`` float32; embeddings without a head."""
        found = self.embed(pixel_values, deterministic=deterministic)
        return found if self.num_labels is None else self.classifier(found)

    def embed(self, pixel_values: Pixels, *, deterministic: bool = True) -> Embedded:
        """Returns the embeddings ``[b, e]`` of normalised images, float32."""
        hidden = self.encoder(pixel_values, deterministic=deterministic)
        if self.config.is_siglip:
            x = self.image_head(hidden)
        else:
            x = self.image_norm(hidden[:, 0])
        x = x if self.config.width is None else self.projection(x)
        return x.astype(jnp.float32)
