"""An encoder–decoder as a plain Linen module, without LoRA.

`lora_jax.adapt` adds the adapters from outside, to both stacks and to
cross-attention.

The parameter tree (kernels are ``[i, o]``, as in Flax)::

    embed/embedding                                  [v, d], of both stacks
    {encoder,decoder}/layer_{i}/attention_norm/scale
    {encoder,decoder}/layer_{i}/attention/{query,key,value,output}/kernel
    {encoder,decoder}/layer_{i}/attention/relative_bias/embedding     [buckets, n];
                                                     of layer 0, or of each
    decoder/layer_{i}/cross_norm/scale
    decoder/layer_{i}/cross_attention/{query,key,value,output}/kernel
    {encoder,decoder}/layer_{i}/mlp_norm/scale
    {encoder,decoder}/layer_{i}/mlp/{up,down}/kernel or {gate,gated_up,down}
    {encoder,decoder}/final_norm/scale
    head/kernel                                      not if tied
    sentence_head/dense_{i}/kernel                   only with such steps
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.models.decoder import REMATS, check_remat
from lora_jax.models.decoder_parts import Head
from lora_jax.models.embeddings import TokenIds, check_tokens
from lora_jax.models.encoder_decoder_block import Block, Hidden, Pair, Part
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.pooling import mean_pool
from lora_jax.models.sentence import SentenceHead
from lora_jax.models.sentence_config import SentenceConfig
from lora_jax.parallel.activation_sharding import shard_rows
from lora_jax.parallel.mesh import promote_table


class Cache(NamedTuple):
    """Keys and values of a decoder's layers; token ``p`` of a row is in slot ``p``.

    Attributes:
      own: of the tokens so far, ``[b, n, s, h]``.
      source: of the encoder's output; computed once.
      mask: ``[b, s]``, True where the source isn't padding.
    """

    own: tuple[Pair, ...]
    source: tuple[Pair, ...]
    mask: Array


class Stack(Part):
    """The blocks of an encoder or a decoder, and the last norm.

    Attributes:
      remat: see `EncoderDecoder`.
      is_decoder: see `Block`.
    """

    remat: str = "none"
    is_decoder: bool = False

    def setup(self):
        """Creates blocks and norm."""
        cfg, block = self.config, Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMATS[self.remat], methods=["__call__"])
        count = cfg.num_decoder_layers if self.is_decoder else cfg.num_layers
        self.layer = [
            block(cfg, self.dtype, self.is_decoder, i == 0 or cfg.has_layer_biases)
            for i in range(count)
        ]
        self.final_norm = self.norm()

    def __call__(self, x: Hidden, mask: Array | None, *source: Any) -> Hidden:
        """Returns the normalised last hidden states; arguments are `Block`'s."""
        places = jnp.arange(x.shape[1])
        distance, bias = (places - places[:, None])[None], None
        for block in self.layer:
            bias = block.biases(distance) if block.has_biases else bias
            x = block(x, bias, mask, *source)
        return self.final_norm(x)

    def source_pairs(self, source: Hidden) -> tuple[Pair, ...]:
        """Returns each block's keys and values of the encoder's output."""
        return tuple(block.source_pair(source) for block in self.layer)

    def step(
        self, x: Hidden, positions: TokenIds, cache: Cache
    ) -> tuple[Hidden, tuple[Pair, ...]]:
        """Runs the next tokens; returns hidden states and the blocks' new caches."""
        size, bias, kept = cache.own[0][0].shape[2], None, []
        distance = jnp.arange(size) - positions[..., None]  # [b, t, s]
        mask = cache.mask[:, None, None, :]
        for block, own, source in zip(self.layer, cache.own, cache.source, strict=True):
            bias = block.biases(distance) if block.has_biases else bias
            x, pair = block.step(x, bias, positions, own, source, mask)
            kept.append(pair)
        return self.final_norm(x), tuple(kept)


class EncoderDecoder(nn.Module):
    """A sequence-to-sequence language model: source ids and target ids to logits.

    With ``config.num_decoder_layers = 0`` it is the encoder alone.

    Attributes:
      config: sizes, constants and variants.
      dtype: dtype of the computation; parameters keep their own.
      remat: what the backward pass recomputes, as for `Decoder`.
      sentence: how `encode` makes embeddings of the encoder's output; None: its mean.

    Raises:
      ValueError: if ``remat`` is unknown.
    """

    config: EncoderDecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    sentence: SentenceConfig | None = None

    def __post_init__(self):
        check_remat(self.remat)
        super().__post_init__()

    def setup(self):
        """Creates embedding, stacks and head."""
        cfg = self.config
        self.embed = nn.Embed(
            cfg.vocab_size, cfg.hidden_size, promote_dtype=promote_table
        )
        self.encoder = Stack(cfg, self.dtype, self.remat)
        if self.sentence is not None:
            self.sentence_head = SentenceHead(self.sentence)
        if cfg.predicts:
            self.decoder = Stack(cfg, self.dtype, self.remat, is_decoder=True)
            if not cfg.is_tied:
                self.head = Head(cfg.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        decoder_input_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Predicts the next token at every position of the target.

        Args:
          input_ids: token ids of the source ``[b, s]``, padded on either side.
          attention_mask: ``[b, s]``, 1 for its tokens and 0 for padding.
          decoder_input_ids: token ids of the target ``[b, t]``, from
            ``config.start_id`` on, padded on the right; None for an encoder alone.
          deterministic: False turns on adapter dropout; the model itself has none.

        Returns:
          Logits ``[b, t, v]`` float32; of an encoder alone its output ``[b, s, d]``.

        Raises:
          ValueError: if shapes differ or there are no target ids.
          TypeError: if ids are not integers.
        """
        if self.is_initializing() and self.sentence is not None:
            self.encode(input_ids, attention_mask)
        if not self.config.predicts:
            return self.read(input_ids, attention_mask)
        return self.logits(self.hidden(input_ids, attention_mask, decoder_input_ids))

    def hidden(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        decoder_input_ids: TokenIds | None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Returns the decoder's normalised, scaled last hidden states ``[b, t, d]``."""
        if decoder_input_ids is None:
            raise ValueError(
                "decoder_input_ids must be the target's token ids [b, t], after "
                f"config.start_id = {self.config.start_id}; got None."
            )
        check_tokens(self.config.max_positions, decoder_input_ids)
        source = self.read(input_ids, attention_mask)
        mask = attention_mask.astype(bool)[:, None, None, :]
        return self._last(
            self.decoder(self._embedded(decoder_input_ids), None, source, mask)
        )

    def read(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Returns the encoder's output ``[b, s, d]``; ignore it at padding."""
        check_tokens(
            self.config.max_positions, input_ids, attention_mask=attention_mask
        )
        mask = attention_mask.astype(bool)[:, None, None, :]
        return self.encoder(self._embedded(input_ids), mask)

    def encode(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b e"]:
        """Returns embeddings ``[b, e]``: as `sentence` says, or the output's mean."""
        hidden = self.read(input_ids, attention_mask)
        if self.sentence is not None:
            return self.sentence_head(hidden, attention_mask)
        return mean_pool(hidden, attention_mask)

    def prefill(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        size: int,
        *,
        deterministic: bool = True,
    ) -> tuple[Hidden, Cache]:
        """Encodes sources into a new cache and runs the token that targets start with.

        Args:
          input_ids: see `__call__`.
          attention_mask: see `__call__`.
          size: slots of the cache for target tokens, at least 1.
          deterministic: see `__call__`.

        Returns:
          Hidden states ``[b, 1, d]`` and the cache.
        """
        cfg, b = self.config, len(input_ids)
        pairs = self.decoder.source_pairs(self.read(input_ids, attention_mask))
        empty = jnp.zeros((b, cfg.num_heads, size, cfg.head_dim), pairs[0][0].dtype)
        own = ((empty, empty),) * cfg.num_decoder_layers
        cache = Cache(own, pairs, attention_mask.astype(bool))
        start = jnp.full((b, 1), cfg.start_id, jnp.int32)
        return self.decode(start, jnp.zeros_like(start), cache)

    def decode(
        self,
        input_ids: TokenIds,
        positions: TokenIds,
        cache: Cache,
        *,
        deterministic: bool = True,
    ) -> tuple[Hidden, Cache]:
        """Runs the next tokens of every target.

        Args:
          input_ids: ``[b, t]``; usually one token per row.
          positions: ``[b, t]`` of these tokens; the first target token has 1.
          cache: of the source and the tokens before.
          deterministic: see `__call__`.

        Returns:
          Hidden states ``[b, t, d]`` and the cache with these tokens added.
        """
        x, own = self.decoder.step(self._embedded(input_ids), positions, cache)
        return self._last(x), cache._replace(own=own)

    def logits(
        self, hidden: Hidden, *, deterministic: bool = True
    ) -> Float[Array, "b t v"]:
        """Returns ``hidden @ head`` in float32."""
        head = self.embed.attend if self.config.is_tied else self.head
        return head(hidden).astype(jnp.float32)

    def _embedded(self, ids: TokenIds) -> Hidden:
        return shard_rows(self.embed(ids).astype(self.dtype))

    def _last(self, x: Hidden) -> Hidden:
        """Scales hidden states: the head is linear, its logits are scaled too."""
        scale = self.config.logit_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)
