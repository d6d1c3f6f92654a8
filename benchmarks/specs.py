"""Named shapes of real models, so that a figure says what it was measured on."""

from typing import NamedTuple

from lora_jax.models.encoder_config import EncoderConfig


class DenseSpec(NamedTuple):
    """One square dense layer in the middle of a network.

    Attributes:
      name: what the report calls it.
      width: ``N``, inputs and outputs.
      rank: ``r``.
      tokens: rows of the input.
    """

    name: str
    width: int
    rank: int
    tokens: int


class EncoderSpec(NamedTuple):
    """One encoder with a classification head.

    Attributes:
      name: what the report calls it.
      config: its sizes.
      rank: ``r``, on every linear layer.
      batch: rows of a batch.
      length: tokens of a row.
    """

    name: str
    config: EncoderConfig
    rank: int
    batch: int
    length: int


DENSE = (
    DenseSpec("BERT-base attention, 768 x 768", 768, 8, 1024),
    DenseSpec("RoBERTa-large attention, 1024 x 1024", 1024, 8, 1024),
    DenseSpec("LLaMA-7B attention, 4096 x 4096", 4096, 16, 512),
)

MINILM = EncoderConfig(
    vocab_size=30522, hidden_size=384, num_layers=6, num_heads=12, mlp_size=1536
)
ENCODERS = (
    EncoderSpec("MiniLM-L6, 32 x 32 tokens", MINILM, 8, 32, 32),
    EncoderSpec("MiniLM-L6, 16 x 128 tokens", MINILM, 8, 16, 128),
)
