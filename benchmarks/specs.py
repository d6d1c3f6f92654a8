"""Named shapes of real models, for reproducible measurements."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.families import FAMILIES


class DenseSpec(NamedTuple):
    """One square dense layer in the middle of a network.

    Attributes:
      name: its name in the report.
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
      name: its name in the report.
      config: its config.
      rank: ``r``, on every linear layer.
      batch: rows per batch.
      length: tokens per row.
    """

    name: str
    config: EncoderConfig
    rank: int
    batch: int
    length: int


class DecoderSpec(NamedTuple):
    """One decoder trained on next-token prediction.

    Attributes:
      name: its name in the report.
      config: its config.
      batch: rows per batch.
      length: tokens per row.
    """

    name: str
    config: DecoderConfig
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

SMALL = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=1408,
    max_positions=2048,
    ropes=(Rope(10000.0, 64),),
    layer_ropes=(0,) * 8,
)
LLAMA_1B = dataclasses.replace(
    SMALL,
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    mlp_size=8192,
    ropes=(Rope(500000.0, 64),),
    layer_ropes=(0,) * 16,
    layer_windows=(None,) * 16,
)
_D_1024 = dataclasses.replace(
    SMALL, hidden_size=1024, num_heads=16, num_kv_heads=16, mlp_size=2816
)
_D_4096 = dataclasses.replace(
    LLAMA_1B,
    hidden_size=4096,
    num_layers=4,
    head_dim=128,
    mlp_size=14336,
    ropes=(Rope(500000.0, 128),),
    layer_ropes=(0,) * 4,
    layer_windows=(None,) * 4,
)
CPU_DECODERS = (
    DecoderSpec("Llama-shaped, d 512, 8 layers", SMALL, 4, 256),
    DecoderSpec("Llama-shaped, d 1024, 8 layers", _D_1024, 2, 256),
)
ACCELERATOR_DECODERS = (
    DecoderSpec("Llama-3.1-8B's shape, 4 of 32 layers, d 4096", _D_4096, 2, 2048),
    DecoderSpec("Llama-3.2-1B's shape, d 2048, 16 layers", LLAMA_1B, 8, 1024),
)


def qwen_moe(num_layers: int, vocab_size: int) -> DecoderConfig:
    """Returns Qwen3-30B-A3B's config with fewer layers and a smaller vocabulary."""
    path = Path(__file__).parent / "models" / "qwen3-30b-a3b" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"num_hidden_layers": num_layers, "vocab_size": vocab_size}
    return FAMILIES[settings["model_type"]].read_config(settings)
