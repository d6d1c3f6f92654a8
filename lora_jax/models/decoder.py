"""A decoder as a plain Linen module, without LoRA.

`lora_jax.adapt` adds the adapters from outside. Every family of causal language model
(Llama, Gemma, GPT-2, ...) is this module with another `DecoderConfig`.

The parameter tree (kernels are ``[i, o]``, as in Flax); with ``scan_layers`` all blocks
are one, ``layers``, with a leading layer axis (a hybrid's are ``layers/0_of_4`` and so
on, if four of them repeat)::

    embed/embedding                                  [v, d]
    positions/embedding                              only with learned positions
    layer_{i}/attention_norm/scale                   not with norm_placement "post"
    layer_{i}/attention/{query,key,value,output}/kernel     or {qkv,output}
    layer_{i}/attention/sinks                        only with has_sinks
    layer_{i}/attention/{query,key}_norm/scale       only with qk_norm
    layer_{i}/{delta_net,short_conv}/...             in a hybrid, in place of attention
    layer_{i}/attention_post_norm/scale              not with norm_placement "pre"
    layer_{i}/mlp_norm/scale
    layer_{i}/mlp/{gate,up,down}/kernel              or {gate_up,down}, or {up,down}
    layer_{i}/mlp/router/kernel                      with experts, in place of these
    layer_{i}/mlp/experts/{gate_up,down}/kernel      [e, i, o]
    layer_{i}/mixture/{router,experts,...}           beside the mlp, in Gemma 4
    layer_{i}/{mlp_own,mixture,mixture_post}_norm/scale                 Gemma 4
    layer_{i}/mlp_post_norm/scale
    layer_{i}/{own_gate,own_up}/kernel, own_norm/scale, layer_scale     Gemma 4
    {own_embed/embedding,own_projection/kernel,own_norm/scale}          Gemma 4
    final_norm/scale
    head/kernel                                      not if tied
    sentence_head/dense_{i}/kernel                   only with such steps
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.attention.dot_product import is_fused_attention
from lora_jax.attention.rope import rope_angles
from lora_jax.models.cache import Cache
from lora_jax.models.decoder_block import Block, Period
from lora_jax.models.decoder_config import DecoderConfig, check_split
from lora_jax.models.decoder_parts import Head, Hidden, PositionContext, make_norm
from lora_jax.models.embeddings import TokenIds, check_tokens
from lora_jax.models.experts import find_stacks
from lora_jax.models.sentence import SentenceHead
from lora_jax.models.sentence_config import SentenceConfig
from lora_jax.names import ATTENDED, LINEAR, ROUTED, X_A
from lora_jax.parallel.activation_sharding import shard_rows, target_platform
from lora_jax.parallel.mesh import promote_table
from lora_jax.parallel.sequence import collect, deal, token_order

MAX_UNROLLED = 8  # scanned layers compiled one by one; more take minutes
UNROLLED = {("tpu", "none"), ("gpu", "none"), ("gpu", "lora")}  # where it is faster
# What the backward pass saves of a block, from most to least memory.
REMATS: dict[str, Any] = {
    "none": None,  # everything it needs
    "lora": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(X_A, LINEAR, ATTENDED),
        is_fused_attention,
    ),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(remat: str) -> None:
    """Raises a `ValueError` unless a model's ``remat`` is known."""
    if remat not in REMATS:
        raise ValueError(f"remat must be one of {tuple(REMATS)}; got {remat!r}.")


class Decoder(nn.Module):
    """A causal language model: token ids to logits.

    Attributes:
      config: sizes, constants and variants.
      dtype: dtype of the computation; parameters keep their own.
      scan_layers: whether the blocks are one `nn.scan` (compiles faster; parameters
        have a leading layer axis under ``layers``) or unrolled.
      remat: what the backward pass recomputes: ``"none"``; with ``"lora"`` norms,
        rotations, activations and scores, saving a block's input, ``x A`` and the
        outputs of attention and of linear layers; or each whole ``"block"``. On
        unrolled blocks it saves memory only on GPU and TPU: XLA:CPU undoes it.
      sentence: how `encode` makes embeddings of hidden states, or None.

    Raises:
      ValueError: if ``remat`` is unknown, or the layers to be scanned differ in their
        parameters.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    sentence: SentenceConfig | None = None

    def __post_init__(self):
        check_remat(self.remat)
        if self.scan_layers and self.config.scan_period is None:
            raise ValueError(
                "scan_layers must be False where some layers have experts and others "
                "an MLP, or they differ in shape and don't repeat; got True."
            )
        super().__post_init__()

    def __call__(
        self,
        input_ids: TokenIds,
        positions: TokenIds | None = None,
        segment_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Predicts the next token at every position.

        Args:
          input_ids: token ids ``[b, t]``; padding goes on the right.
          positions: ``[b, t]``, each token's position in its example; ``0 ... t-1`` if
            None.
          segment_ids: ``[b, t]``, each token's example in a packed row; tokens of
            different examples don't see each other.
          deterministic: False turns on adapter dropout; the model itself has none.

        Returns:
          Logits ``[b, t, v]`` float32; without a head the last hidden states.

        Raises:
          ValueError: if the shapes differ or ``t`` exceeds ``config.max_positions``.
          TypeError: if ``input_ids`` are not integers.
        """
        hidden = self.hidden(input_ids, positions, segment_ids)
        if self.sentence is not None and self.is_initializing():
            self.sentence_head(hidden, jnp.ones_like(input_ids))
        return self.logits(hidden) if self.config.has_head else hidden

    def encode(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b e"]:
        """Returns the embeddings ``[b, e]`` of texts, as `sentence` says.

        Args:
          input_ids: token ids ``[b, t]``.
          attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding.
          deterministic: see `__call__`.
        """
        if self.sentence is None:
            raise ValueError(
                "sentence must not be None: a decoder's folder needs a modules.json."
            )
        hidden = self.hidden(input_ids, segment_ids=attention_mask)
        return self.sentence_head(hidden, attention_mask)

    def hidden(
        self,
        input_ids: TokenIds,
        positions: TokenIds | None = None,
        segment_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Returns the normalised last hidden states ``[b, t, d]``; see `__call__`."""
        given = (input_ids, positions, segment_ids)
        others = {"positions": positions, "segment_ids": segment_ids}
        check_tokens(self.config.max_positions, input_ids, **others)
        order = token_order(input_ids.shape[1])
        if order is not None:
            check_split(self.config)
            input_ids, positions, segment_ids = jax.tree.map(deal, given)
            if positions is None:
                positions = jnp.broadcast_to(order, input_ids.shape)
        x, place = self._embed(input_ids, positions, segment_ids)
        x, _ = self._blocks(x, place._replace(order=order), "__call__")
        return self._last(x) if order is None else collect(self._last(x))

    def prefill(
        self,
        input_ids: TokenIds,
        size: int,
        *,
        lengths: Int[Array, " b"] | None = None,
        is_long: bool | None = None,
        deterministic: bool = True,
    ) -> tuple[Hidden, Cache]:
        """Runs prompts and fills a new cache.

        Args:
          input_ids: ``[b, t]``, padded on the right.
          size: slots of the cache, at least ``t``.
          lengths: ``[b]``, tokens of each row; None if there is no padding. Attention
            ignores padding without them; other mixers need them.
          is_long: longrope: whether the sequence exceeds its original context; None
            decides by ``t``. All calls for one cache must agree.
          deterministic: see `__call__`.

        Returns:
          Hidden states ``[b, t, d]`` and the cache, with ``size`` slots per row.
        """
        if not self.config.is_causal:
            raise ValueError(
                "is_causal must be True to generate: this model reads both ways, and "
                "makes embeddings."
            )
        if size < input_ids.shape[1]:
            raise ValueError(
                f"the cache must have a slot for each of the {input_ids.shape[1]} "
                f"tokens of the prompt; got size = {size}."
            )
        check_tokens(self.config.max_positions, input_ids)
        if is_long is None:
            is_long = self._exceeds(input_ids.shape[1])
        x, place = self._embed(input_ids, None, None, is_long)
        x, kept = self._blocks(x, place._replace(lengths=lengths), "run")
        return self._last(x), Cache(kept).in_slots(size)

    def decode(
        self,
        input_ids: TokenIds,
        positions: TokenIds,
        cache: Cache,
        *,
        is_long: bool | None = None,
        deterministic: bool = True,
    ) -> tuple[Hidden, Cache]:
        """Runs the next tokens of every row.

        Args:
          input_ids: ``[b, t]``; usually one token per row.
          positions: ``[b, t]`` of these tokens.
          cache: of the tokens before them.
          is_long: longrope: as given to `prefill`; None decides by the cache's size.
          deterministic: see `__call__`.

        Returns:
          Hidden states ``[b, t, d]`` and the cache with these tokens added.
        """
        check_tokens(self.config.max_positions, input_ids, positions=positions)
        if is_long is None:
            is_long = self._exceeds(cache.size)
        x, place = self._embed(input_ids, positions, None, is_long)
        place = place._replace(slots=positions)
        x, layers = self._blocks(x, place, "run", cache)
        return self._last(x), Cache(layers)

    def logits(
        self, hidden: Hidden, *, deterministic: bool = True
    ) -> Float[Array, "b t v"]:
        """Returns ``hidden @ head`` in float32, soft-capped if the config says so."""
        if not self.config.has_head:
            raise ValueError("has_head must be True to predict tokens; got False.")
        head = self.embed.attend if self.config.is_tied else self.head
        logits, cap = head(hidden).astype(jnp.float32), self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def setup(self):
        """Creates embedding, blocks, final norm and head."""
        cfg = self.config
        self.embed = nn.Embed(
            cfg.vocab_size, cfg.hidden_size, promote_dtype=promote_table
        )
        if cfg.has_learned_positions:
            self.positions = nn.Embed(cfg.max_positions, cfg.hidden_size)
        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block,
                prevent_cse=not self.scan_layers,
                policy=REMATS[self.remat],
                static_argnums=() if self.scan_layers else (3,),  # the layer's number
                methods=["__call__"],
            )
        if self.scan_layers:
            scan = {
                "variable_axes": {"params": 0, ROUTED: 0},
                "split_rngs": {"params": True, "dropout": True},
                "length": self._steps(),
                "unroll": self._unroll(),
            }
            is_period = cfg.scan_period != 1
            scanned = nn.scan(
                Period if is_period else block,
                methods={
                    "__call__": {**scan, "in_axes": (nn.broadcast, 0)},
                    "run": {**scan, "in_axes": (nn.broadcast, 0, 0)},
                },
            )
            self.layers = scanned(cfg, self.dtype, *([block] if is_period else []))
        else:
            self.layer = [
                block(cfg.of_layer(i), self.dtype) for i in range(cfg.num_layers)
            ]
        if cfg.per_layer_size is not None:
            width = cfg.num_layers * cfg.per_layer_size
            self.own_embed = nn.Embed(
                cfg.per_layer_vocab, width, promote_dtype=promote_table
            )
            self.own_projection = nn.Dense(width, use_bias=False, dtype=self.dtype)
            self.own_norm = make_norm(cfg, self.dtype, None)
        self.final_norm = make_norm(cfg, self.dtype, None)
        if self.sentence is not None:
            self.sentence_head = SentenceHead(self.sentence)
        if cfg.has_head and not cfg.is_tied:
            self.head = Head(cfg.vocab_size, use_bias=False, dtype=self.dtype)

    def _last(self, x: Hidden) -> Hidden:
        """The normalised hidden states, scaled: the head is linear, its logits too."""
        x, scale = self.final_norm(x), self.config.logit_scale
        return x if scale == 1 else x * scale

    def _steps(self) -> int:
        """Returns the number of steps of the scan over the blocks."""
        return self.config.num_layers // (self.config.scan_period or 1)

    def _unroll(self) -> int:
        """Returns the number of steps that are compiled in one pass of the loop.

        A loop copies what the backward pass needs into a stack and out of it: 4 of 50
        ms of four Llama-8B layers on an H100, and an estimated 7 % of them on v5e.
        """
        is_short = self.config.num_layers <= MAX_UNROLLED
        is_faster = (target_platform(), self.remat) in UNROLLED
        return self._steps() if is_short and is_faster else 1

    def _exceeds(self, length: int) -> bool:
        original = self.config.original_positions
        return original is not None and length > original

    def _embed(
        self, input_ids, positions, segment_ids, is_long=None
    ) -> tuple[Hidden, PositionContext]:
        """Returns the tokens' embeddings and positions.

        Longrope's factors are those for the longest sequence in the batch, as in
        transformers: by the positions if given, else by the row length.
        """
        cfg, original = self.config, self.config.original_positions
        longer: Any = is_long
        if longer is None and original is not None and positions is not None:
            longer = jnp.max(positions) >= original
        elif longer is None:
            longer = self._exceeds(input_ids.shape[1])
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids).astype(self.dtype)
        x = x * jnp.asarray(cfg.embed_scale, self.dtype)
        if cfg.has_learned_positions:
            x = x + self.positions(positions).astype(self.dtype)
        cos, sin = [], []
        for rope in cfg.ropes:
            frequencies = jnp.asarray(rope.frequencies())
            if rope.long_divisors:
                stretched = jnp.asarray(rope.frequencies(is_long=True))
                frequencies = jnp.where(longer, stretched, frequencies)
            angles = rope_angles(positions, frequencies)
            cos.append(jnp.cos(angles) * rope.attention_factor)
            sin.append(jnp.sin(angles) * rope.attention_factor)
        if cos and len(set(cfg.layer_ropes)) > 1:  # for scanned layers without RoPE
            cos.append(jnp.ones_like(cos[0]))
            sin.append(jnp.zeros_like(sin[0]))
        growth = None
        if cfg.query_growth is not None:
            beta, unit = cfg.query_growth
            growth = 1 + beta * jnp.log1p((positions // unit).astype(jnp.float32))
        own = self._own(input_ids, x)
        place = PositionContext(tuple(cos), tuple(sin), growth, None, segment_ids, own)
        return shard_rows(x), place

    def _own(self, input_ids: TokenIds, x: Hidden) -> Array | None:
        """What each layer reads of the tokens ``[b, t, l, p]``: a row, a projection."""
        cfg = self.config
        if cfg.per_layer_size is None:
            return None
        shape = (*input_ids.shape, cfg.num_layers, cfg.per_layer_size)
        rows = self.own_embed(input_ids).astype(self.dtype).reshape(shape)
        projected = self.own_projection(x) * cfg.hidden_size**-0.5
        projected = self.own_norm(projected.reshape(shape))
        return (projected + rows * cfg.per_layer_size**0.5) * 2**-0.5

    def _blocks(
        self, x: Hidden, place: PositionContext, method: str, cache: Cache | None = None
    ) -> tuple[Hidden, Any]:
        """Runs all blocks; returns ``x`` and what each layer keeps, or None."""
        if self.scan_layers:
            numbers = jnp.arange(self._steps())
            place = place._replace(stacks=find_stacks(self))
            past = () if method == "__call__" else (cache and cache.layers,)
            return getattr(self.layers, method)(x, place, numbers, *past)
        kept = []
        for i, block in enumerate(self.layer):
            source = self.config.of_layer(i).key_source
            if source is not None:
                place = place._replace(given=kept[source])
            past = () if cache is None else (cache.layers[i],)
            x, own = getattr(block, method)(x, place, i, *past)
            kept.append(own)
        return x, None if method == "__call__" else tuple(kept)
