"""Encoders of text and images as plain Linen modules, without LoRA.

`lora_jax.adapt` adds the adapters from outside, so these files hold only the models:
embeddings, blocks, and a head. Every family (BERT, RoBERTa, ViT, ...) is these
modules with another config.

The parameter tree (kernels are ``[i, o]``, as in Flax)::

    encoder/embeddings/{word,position,token_type}/embedding     text only
    encoder/embeddings/norm/{scale,bias}                        text only
    encoder/embeddings/patch/{kernel,bias}                      images only
    encoder/embeddings/{cls,position}                           images only
    encoder/embeddings/projection/{kernel,bias}       only with embedding_size
    encoder/relative_bias/embedding                   only with num_buckets
    encoder/distances/embedding, encoder/distance_norm/{scale,bias}   DeBERTa
    encoder/conv/{conv/{kernel,bias},norm/{scale,bias}}               DeBERTa
    encoder/layer_{i}/attention/{query,key,value,output}/{kernel,bias}   or {qkv,output}
    encoder/layer_{i}/attention_norm/{scale,bias}
    encoder/layer_{i}/mlp/{up,down}/{kernel,bias}               or {gate_up,gated_down}
    encoder/layer_{i}/mlp_norm/{scale,bias}
    encoder/layer_{i}/{attention_scale,mlp_scale}     only with layer scale
    encoder/final_norm/{scale,bias}                   only with norm_placement="pre"
    pooler/{kernel,bias}                              only with pooling="pooler"
    pooler_norm/{scale,bias}                          only with has_pooler_norm
    classifier/{kernel,bias}                          only with num_labels
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.embeddings import (
    Embeddings,
    Hidden,
    PatchEmbeddings,
    Pixels,
    TokenIds,
    check_tokens,
)
from lora_jax.models.encoder_block import Block, ConvBlock, make_norm
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.models.pooling import POOLINGS, Pooled, mean_pool, pool
from lora_jax.models.relative import relative_buckets
from lora_jax.models.sentence import SentenceHead
from lora_jax.models.sentence_config import SentenceConfig

POOLER_ACTIVATIONS = {**ACTIVATIONS, "tanh": jnp.tanh}


class Encoder(nn.Module):
    """A text encoder: token ids to hidden states.

    Attributes:
      config: the sizes.
      dtype: dtype of the computation and of the result; parameters keep their own.
      dropout_rate: dropout on each sublayer's output, as BERT's
        ``hidden_dropout_prob``. Attention probabilities are never dropped.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Encodes a batch of sequences.

        Args:
          input_ids: token ids ``[b, t]``.
          attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding.
          token_type_ids: segment ids ``[b, t]``; all 0 if not given.
          deterministic: False turns on dropout (PRNG stream "dropout").

        Returns:
          Hidden states ``[b, t, d]``; ignore those at padding.

        Raises:
          ValueError: if the shapes differ or ``t`` exceeds ``config.max_positions``.
          TypeError: if ``input_ids`` are not integers.
        """
        check_tokens(
            self.config.max_positions,
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )
        mask = attention_mask.astype(bool)
        x = Embeddings(self.config, self.dtype, name="embeddings")(
            input_ids, token_type_ids
        )
        return run_blocks(self, x, mask, deterministic)


class ImageEncoder(nn.Module):
    """An image encoder: pixels to hidden states of patches; see `Encoder`."""

    config: ImageEncoderConfig
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, pixel_values: Pixels, *, deterministic: bool = True) -> Hidden:
        """Encodes a batch of images.

        Args:
          pixel_values: normalised images ``[b, c, y, x]``, as in Hugging Face.
          deterministic: False turns on dropout (PRNG stream "dropout").

        Returns:
          Hidden states ``[b, 1 + patches, d]``: the class token's, if there is one,
          then the patches' row by row.

        Raises:
          ValueError: if the images don't have the config's channels and size.
          TypeError: if ``pixel_values`` are not floats.
        """
        check_pixels(self.config, pixel_values)
        x = PatchEmbeddings(self.config, self.dtype, name="embeddings")(pixel_values)
        return run_blocks(self, x, None, deterministic)


def run_blocks(
    owner: "Encoder | ImageEncoder", x: Hidden, mask: Array | None, deterministic: bool
) -> Hidden:
    """Makes and runs the blocks of ``owner``, whose compact method calls this.

    ``mask`` is boolean ``[b, t]``, True for real tokens; None if all are.
    """
    cfg, dtype, rate = owner.config, owner.dtype, owner.dropout_rate
    x = nn.Dropout(rate)(x, deterministic=deterministic)
    bias = None
    if cfg.num_buckets is not None:
        t = x.shape[1]
        table = nn.Embed(cfg.num_buckets, cfg.num_heads, name="relative_bias")
        distance = np.arange(t) - np.arange(t)[:, None]
        buckets = relative_buckets(distance, cfg.num_buckets)  # [t, t]
        bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]  # [1, n, t, t]
    if cfg.disentangled is not None:
        own, width = cfg.disentangled, cfg.hidden_size
        bias = nn.Embed(2 * own.span, width, name="distances")(
            jnp.arange(2 * own.span)
        ).astype(dtype)  # [p, d]
        bias = make_norm(cfg, dtype, "distance_norm")(bias) if own.has_norm else bias
    embedded = x
    for i in range(cfg.num_layers):
        block = Block(cfg, dtype, rate, i, name=f"layer_{i}")
        x = block(x, mask, deterministic, bias)
        if i == 0 and cfg.conv is not None:
            x = ConvBlock(cfg, dtype, name="conv")(embedded, x, mask)
    if cfg.norm_placement == "pre" and cfg.has_final_norm:
        x = make_norm(cfg, dtype, "final_norm")(x)
    return x


def check_pixels(config: ImageEncoderConfig, pixel_values: Any) -> None:
    """Raises unless the array is a batch ``[b, c, y, x]`` of images for the config."""
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise TypeError(
            f"pixel_values must be floats [b, c, y, x]; got dtype "
            f"{pixel_values.dtype}. Rescale and normalise bytes first: "
            "`lora_jax.files.images.load_processor(folder)` follows the model's own "
            "preprocessor_config.json."
        )
    shape, own = pixel_values.shape, (config.image_height, config.image_width)
    is_batch = len(shape) == 4 and shape[1] == config.num_channels
    wanted, is_sized = f"size {own}", shape[-2:] == own
    if config.is_resizable and is_batch:
        wanted, is_sized = "at least one patch", 0 not in config.grid(*shape[-2:])
    if not (is_batch and is_sized):
        raise ValueError(
            f"pixel_values must be [b, c, y, x] with c = {config.num_channels} and "
            f"{wanted}; got shape {shape}. A single image needs a batch dimension: "
            "`image[None]`; channels come first."
        )


class Classifier(nn.Module):
    """An encoder, pooled to one vector per row, with a linear head; see the subclasses.

    Attributes:
      config: the encoder's sizes.
      num_labels: classes of the head; None for no head.
      pooling: "mean" over unmasked tokens, "cls" (the first token's hidden state),
        "pooler" (``activation(W cls + b)``: BERT's pooler, the first dense layer of
        RoBERTa's and DistilBERT's heads; with a norm, ModernBERT's) or "cls_mean"
        (DINOv2's: the first token's, concatenated with the mean of the others).
      dtype: dtype of the encoder's computation; pooling and head are float32.
      dropout_rate: see `Encoder`.
      sentence: what makes embeddings of hidden states, as a folder of
        sentence-transformers says; None for the mean. Without a head it is the output.

    Raises:
      ValueError: if ``pooling`` is unknown or ``num_labels`` is below 1.
    """

    config: Any
    num_labels: int | None = None
    pooling: str = "mean"
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    sentence: SentenceConfig | None = None

    encoder_type: ClassVar[Any] = None

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling must be one of {POOLINGS}; got {self.pooling!r}."
            )
        if self.pooling == "pooler" and self.config.pooler_activation is None:
            raise ValueError(
                "pooling must not be 'pooler' for a model without a pooler; "
                "'mean', 'cls' and 'cls_mean' need none."
            )
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(
                f"num_labels must be at least 1, or None for no head; "
                f"got {self.num_labels}."
            )
        super().__post_init__()

    def setup(self):
        """Creates the encoder and, if configured, the pooler and the head."""
        self.encoder = self.encoder_type(self.config, self.dtype, self.dropout_rate)
        if self.pooling == "pooler":
            cfg = self.config
            bias = cfg.has_pooler_bias
            self.pooler = nn.Dense(cfg.hidden_size, bias, dtype=jnp.float32)
            if cfg.has_pooler_norm:
                self.pooler_norm = make_norm(cfg, jnp.float32, None)
        if self.num_labels is not None:
            self.classifier = nn.Dense(self.num_labels, dtype=jnp.float32)
        if self.sentence is not None:
            self.sentence_head = SentenceHead(self.sentence)

    def head(self, hidden: Hidden, mask: TokenIds) -> Float[Array, "b o"]:
        """Pools hidden states ``[b, t, d]`` and classifies them.

        Returns logits ``[b, num_labels]`` float32; the pooled vectors without a head.
        """
        if self.sentence is not None and self.num_labels is None:
            return self.sentence_head(hidden, mask)
        has_pooler = self.pooling == "pooler"
        kind = self.config.pooler_input if has_pooler else self.pooling
        pooled = pool(hidden, mask, kind)
        if has_pooler:
            activation = POOLER_ACTIVATIONS[self.config.pooler_activation]
            pooled = activation(self.pooler(pooled))
            if self.config.has_pooler_norm:
                pooled = self.pooler_norm(pooled)
        return pooled if self.num_labels is None else self.classifier(pooled)


class SequenceClassifier(Classifier):
    """A text `Encoder` with a head; its attributes are `Classifier`'s."""

    encoder_type: ClassVar[Any] = Encoder

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b o"]:
        """Classifies a batch of sequences; arguments are `Encoder`'s.

        Returns logits ``[b, num_labels]`` float32; the pooled vectors without a head.
        """
        hidden = self.encoder(
            input_ids, attention_mask, token_type_ids, deterministic=deterministic
        )
        return self.head(hidden, attention_mask)

    def embed(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Pooled:
        """Returns sentence embeddings ``[b, d]``.

        They are what ``sentence`` says, else the mean over unmasked tokens.
        """
        hidden = self.encoder(
            input_ids, attention_mask, token_type_ids, deterministic=deterministic
        )
        if self.sentence is not None:
            return self.sentence_head(hidden, attention_mask)
        return mean_pool(hidden, attention_mask)


class ImageClassifier(Classifier):
    """An `ImageEncoder` with a head; its attributes are `Classifier`'s."""

    encoder_type: ClassVar[Any] = ImageEncoder

    def __call__(
        self, pixel_values: Pixels, *, deterministic: bool = True
    ) -> Float[Array, "b o"]:
        """Classifies a batch of images; arguments are `ImageEncoder`'s.

        Returns logits ``[b, num_labels]`` float32; the pooled vectors without a head.
        """
        hidden = self.encoder(pixel_values, deterministic=deterministic)
        return self.head(hidden, jnp.ones(hidden.shape[:2], jnp.int32))

    def embed(self, pixel_values: Pixels, *, deterministic: bool = True) -> Pooled:
        """Returns image embeddings ``[b, d]``: the mean over all tokens."""
        hidden = self.encoder(pixel_values, deterministic=deterministic)
        return mean_pool(hidden, jnp.ones(hidden.shape[:2], jnp.int32))
