"""BERT as a plain Linen module, with no LoRA inside.

`lora_jax.adapt` adds the adapters from outside, so that this file reads as the model
alone: embeddings, then post-norm blocks ``x = norm(x + sublayer(x))``.

The parameter tree (kernels ``[i, o]``, as Flax stores them)::

    encoder/embeddings/{word,position,token_type}/embedding
    encoder/embeddings/norm/{scale,bias}
    encoder/layer_{i}/attention/{query,key,value,output}/{kernel,bias}
    encoder/layer_{i}/attention_norm/{scale,bias}
    encoder/layer_{i}/mlp/{up,down}/{kernel,bias}
    encoder/layer_{i}/mlp_norm/{scale,bias}
    pooler/{kernel,bias}              only with pooling="pooler"
    classifier/{kernel,bias}          only with num_labels
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TokenIds = Int[Array, "b t"]
Hidden = Float[Array, "b t d"]
Pooled = Float[Array, "b d"]

POOLINGS = ("mean", "cls", "pooler")


def exact_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Computes ``x * Phi(x)`` with the error function, as BERT was trained with.

    ``jax.nn.gelu(approximate=False)`` is the same through ``erfc``, which XLA evaluates
    by two expansions and a select; ``erf``, as PyTorch has it, is the shorter program.

    Args:
      x: inputs ``[*b, f]``.

    Returns:
      Activations ``[*b, f]``, in the dtype of ``x``.

    Example:
      >>> [f"{y:.4f}" for y in exact_gelu(jnp.array([0.0, 1.0]))]
      ['0.0000', '0.8413']
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def tanh_gelu(x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Computes the tanh approximation of GELU; see `exact_gelu`."""
    return nn.gelu(x, approximate=True)


# The activation names of Hugging Face configs; the "fast" and "new" ones are tanh.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of a BERT encoder.

    Attributes:
      vocab_size: rows of the word embedding, ``v``.
      hidden_size: width of the model, ``d``.
      num_layers: number of blocks, ``l``.
      num_heads: attention heads, ``n``; divides ``hidden_size``.
      mlp_size: width inside the MLP, ``f``.
      max_positions: rows of the position embedding, the longest sequence.
      num_token_types: rows of the token type embedding.
      activation: one of `ACTIVATIONS`, by its Hugging Face name.
      norm_eps: LayerNorm's epsilon.

    Raises:
      ValueError: if a size or constant is out of range; every fault is named.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12

    def __post_init__(self):
        sizes = [f.name for f in dataclasses.fields(self) if f.type is int]
        faults = [
            f"{name} must be a positive integer; got {getattr(self, name)!r}"
            for name in sizes
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if not faults and self.hidden_size % self.num_heads:
            faults.append(
                f"num_heads must divide hidden_size = {self.hidden_size}; "
                f"got {self.num_heads}"
            )
        if self.activation not in ACTIVATIONS:
            faults.append(
                f"activation must be one of {sorted(ACTIVATIONS)}; "
                f"got {self.activation!r}"
            )
        if not isinstance(self.norm_eps, (int, float)) or not self.norm_eps > 0:
            faults.append(f"norm_eps must be above 0; got {self.norm_eps!r}")
        if faults:
            raise ValueError("EncoderConfig: " + "; ".join(faults) + ".")


class Embeddings(nn.Module):
    """Sums word, position and token type embeddings and normalises the sum."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: TokenIds, token_type_ids: TokenIds | None = None
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ids ``[b, t]``; without types all are type 0."""
        cfg, length = self.config, input_ids.shape[1]
        if length > cfg.max_positions:
            raise ValueError(
                f"input_ids must have at most max_positions = {cfg.max_positions} "
                f"tokens a row; got shape {input_ids.shape}. Truncate when tokenising: "
                "`encode(texts, max_length=...)`."
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        # No dtype here: a cast would be of the whole table, not of the rows looked up.
        word = nn.Embed(cfg.vocab_size, cfg.hidden_size, name="word")
        position = nn.Embed(cfg.max_positions, cfg.hidden_size, name="position")
        token_type = nn.Embed(cfg.num_token_types, cfg.hidden_size, name="token_type")
        x = word(input_ids) + position(jnp.arange(length)) + token_type(token_type_ids)
        return nn.LayerNorm(cfg.norm_eps, dtype=self.dtype, name="norm")(x)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention over the unmasked tokens."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden, mask: Array) -> Hidden:
        """Returns ``[b, t, d]``; ``mask`` is boolean ``[b, 1, 1, t]``, True = real."""
        cfg = self.config
        heads = (*x.shape[:-1], cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        query, key, value = (
            nn.Dense(cfg.hidden_size, dtype=self.dtype, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )  # each [b, t, n, h]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return nn.Dense(cfg.hidden_size, dtype=self.dtype, name="output")(
            mixed.reshape(x.shape)
        )


class Mlp(nn.Module):
    """Computes ``activation(x W_up) W_down``."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""
        x = nn.Dense(self.config.mlp_size, dtype=self.dtype, name="up")(x)
        x = ACTIVATIONS[self.config.activation](x)  # [b, t, f]
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """One post-norm transformer block."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Hidden, mask: Array, deterministic: bool = True) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``; ``mask`` as for `Attention`."""
        eps, drop = self.config.norm_eps, nn.Dropout(self.dropout_rate)
        y = Attention(self.config, self.dtype, name="attention")(x, mask)
        y = drop(y, deterministic=deterministic)
        x = nn.LayerNorm(eps, dtype=self.dtype, name="attention_norm")(x + y)
        y = Mlp(self.config, self.dtype, name="mlp")(x)
        y = drop(y, deterministic=deterministic)
        return nn.LayerNorm(eps, dtype=self.dtype, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """A BERT encoder: token ids to hidden states.

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
          deterministic: False switches dropout on (PRNG stream "dropout").

        Returns:
          Hidden states ``[b, t, d]``; those at padding mean nothing.

        Raises:
          ValueError: if the shapes differ or ``t`` exceeds ``config.max_positions``.
          TypeError: if ``input_ids`` are not integers.
        """
        check_inputs(input_ids, attention_mask, token_type_ids)
        mask = attention_mask.astype(bool)[:, None, None, :]  # [b, 1, 1, t]
        x = Embeddings(self.config, self.dtype, name="embeddings")(
            input_ids, token_type_ids
        )
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        for i in range(self.config.num_layers):
            block = Block(self.config, self.dtype, self.dropout_rate, name=f"layer_{i}")
            x = block(x, mask, deterministic)
        return x


def check_inputs(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
    """Raises unless the three arrays are one batch ``[b, t]`` of token ids."""
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise TypeError(
            f"input_ids must be integers [b, t]; got dtype {input_ids.dtype}. "
            "Token ids come from a tokenizer; `astype(int32)` if these are ids."
        )
    shapes = {"attention_mask": attention_mask.shape}
    if token_type_ids is not None:
        shapes["token_type_ids"] = token_type_ids.shape
    if input_ids.ndim != 2 or any(s != input_ids.shape for s in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            "input_ids, attention_mask and token_type_ids must share one shape "
            f"[b, t]; got input_ids {input_ids.shape}, {listed}. A single sequence "
            "needs a batch dimension: `ids[None]`."
        )


def mean_pool(hidden: Hidden, attention_mask: TokenIds) -> Pooled:
    """Averages the hidden states of unmasked tokens, in float32.

    Computes ``sum_t mask * hidden / max(sum_t mask, 1)``.

    Args:
      hidden: hidden states ``[b, t, d]``.
      attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding.

    Returns:
      Averages ``[b, d]`` float32; zeros for a row of padding alone.

    Example:
      >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])).item()
      2.0
    """
    mask = attention_mask.astype(jnp.float32)[..., None]  # [b, t, 1]
    total = jnp.sum(hidden.astype(jnp.float32) * mask, axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1.0)


class SequenceClassifier(nn.Module):
    """An `Encoder`, pooled to one vector a sequence, with a linear head.

    Attributes:
      config: the encoder's sizes.
      num_labels: classes of the head; None for no head.
      pooling: "mean" over unmasked tokens, "cls" (the first token's hidden state) or
        "pooler" (BERT's own: ``tanh(W cls + b)``).
      dtype: dtype of the encoder's computation; pooling and head are float32.
      dropout_rate: see `Encoder`.

    Raises:
      ValueError: if ``pooling`` is unknown or ``num_labels`` is below 1.
    """

    config: EncoderConfig
    num_labels: int | None = None
    pooling: str = "mean"
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling must be one of {POOLINGS}; got {self.pooling!r}."
            )
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(
                f"num_labels must be at least 1, or None for no head; "
                f"got {self.num_labels}."
            )
        super().__post_init__()

    def setup(self):
        """Creates the encoder and, where asked for, the pooler and the head."""
        self.encoder = Encoder(self.config, self.dtype, self.dropout_rate)
        if self.pooling == "pooler":
            self.pooler = nn.Dense(self.config.hidden_size)
        if self.num_labels is not None:
            self.classifier = nn.Dense(self.num_labels)

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenIds | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b o"]:
        """Classifies a batch of sequences.

        Args:
          input_ids: token ids ``[b, t]``.
          attention_mask: ``[b, t]``, 1 for real tokens and 0 for padding.
          token_type_ids: segment ids ``[b, t]``; all 0 if not given.
          deterministic: False switches dropout on (PRNG stream "dropout").

        Returns:
          Logits ``[b, num_labels]`` float32; the pooled ``[b, d]`` without a head.
        """
        hidden = self.encoder(
            input_ids, attention_mask, token_type_ids, deterministic=deterministic
        )
        if self.pooling == "mean":
            pooled = mean_pool(hidden, attention_mask)
        else:
            pooled = hidden[:, 0].astype(jnp.float32)
        if self.pooling == "pooler":
            pooled = jnp.tanh(self.pooler(pooled))
        return pooled if self.num_labels is None else self.classifier(pooled)

    def embed(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenIds | None = None,
    ) -> Pooled:
        """Returns sentence embeddings ``[b, d]``: the mean over unmasked tokens."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        return mean_pool(hidden, attention_mask)
