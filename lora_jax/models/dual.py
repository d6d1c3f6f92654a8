"""CLIP and SigLIP: an encoder of images and one of texts, with embeddings to compare.

The parameter tree of both (see `lora_jax.models.encoder` for each)::

    vision/..., text/...
    vision_norm/{scale,bias}                          of the class token: CLIP
    {visual_projection,text_projection}/kernel        CLIP
    vision_head/{probe,norm/{scale,bias}}             SigLIP
    vision_head/{in_proj,output,up,down}/{kernel,bias}
    text_head/{kernel,bias}                           SigLIP
    logit_scale, logit_bias                           the latter SigLIP's

and of an encoder in a folder of its own::

    encoder/...
    image_norm/{scale,bias}                           of the class token: CLIP's images
    image_head/...                                    as vision_head: SigLIP's images
    projection/{kernel,bias}                          only with ``width``
    classifier/{kernel,bias}                          only with num_labels
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.attention.dot_product import attention
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder_parts import Head
from lora_jax.models.embeddings import Hidden, Pixels, TokenIds
from lora_jax.models.encoder import Classifier, Encoder, ImageEncoder
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
        last = self.text_head if self.config.is_siglip else self.text_projection
        return _unit(last(pool_text(self.config, hidden, input_ids)))

    def embed_image(
        self, pixel_values: Pixels, *, deterministic: bool = True
    ) -> Embedded:
        """Returns the embeddings ``[i, e]`` of images, of length 1; see `__call__`."""
        hidden = self.vision(pixel_values)
        if self.config.is_siglip:
            return _unit(self.vision_head(hidden))
        return _unit(self.visual_projection(self.vision_norm(hidden[:, 0])))


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
        hidden = self.encoder(input_ids, attention_mask, deterministic=deterministic)
        x = pool_text(self.config, hidden, input_ids)
        x = x if self.config.width is None else self.projection(x)
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


def pool_text(
    config: DualConfig | TextTowerConfig, hidden: Hidden, input_ids: TokenIds
) -> Float[Array, "b d"]:
    """Returns the hidden state at the last place (SigLIP), or the first end (CLIP)."""
    if config.is_siglip:
        return hidden[:, -1]
    is_end = input_ids if config.end_id is None else input_ids == config.end_id
    place = jnp.argmax(is_end, axis=1)[:, None, None]
    return jnp.take_along_axis(hidden, place, axis=1)[:, 0]


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
