"""GGUF files: llama.cpp's models, read as if they were Hugging Face's.

Names, shapes, the order of rows and the config are those of a Hugging Face folder, so
one loader reads both. Tensors are dequantised to float32 one at a time on access: the
result is the rounded model, not the original one.

llama.cpp's converter does two things to weights, and both are undone here. It permutes
the rows of ``q_proj`` and ``k_proj`` of the *llama* architecture from rotate-half to
interleaved RoPE (other architectures keep theirs), and it adds the 1 of Gemma's
``(1 + weight)`` to its norms.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.gguf_config import (
    ARCHITECTURES,
    ROPE_FACTORS,
    architecture_of,
    hugging_face_config,
    hugging_face_name,
)
from lora_jax.files.gguf_header import read_header
from lora_jax.files.optional import load_optional

SUFFIX = ".gguf"


def _gguf() -> Any:
    return load_optional("reading GGUF files", "gguf")


class GGUFReader:
    """The tensors and the config of a GGUF file, with Hugging Face's names.

    It has the interface of `lora_jax.files.safetensors.TensorReader`. The tokenizer is
    read by `lora_jax.files.gguf_tokenizer`.

    Attributes:
      files: the one file.
      shapes: from each tensor's Hugging Face name to its shape, ``(out, in)``.
      metadata: the file's fields, by the file's own keys.
      config: the equivalent of ``config.json``.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or not a GGUF file, or its architecture or one of its
        tensors is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]):
        library, path = _gguf(), Path(path)
        sizes = {int(k): v for k, v in library.GGML_QUANT_SIZES.items()}
        header = read_header(path, sizes)
        self.files = (path,)
        self.metadata: dict[str, Any] = header.metadata
        self._architecture = architecture_of(path, header.metadata)
        self._data = header.data
        named = {
            name: hugging_face_name(name, self._architecture) for name in header.tensors
        }
        unknown = sorted(
            n for n, known in named.items() if known is None and n != ROPE_FACTORS
        )
        if unknown:
            raise ValueError(
                f"{path} must hold tensors of the architecture "
                f"{self._architecture!r}; {len(unknown)} of {len(named)} are not "
                f"known: {unknown[:8]}. Take the model's Hugging Face folder instead."
            )
        self._stored = {known: header.tensors[n] for n, known in named.items() if known}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: stored.shape for name, stored in self._stored.items()
        }
        factors = header.tensors.get(ROPE_FACTORS)
        self.config = hugging_face_config(
            path,
            header.metadata,
            self.shapes,
            None if factors is None else self._dequantised(ROPE_FACTORS, factors),
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory, as float32."""
        if name not in self._stored:
            raise ValueError(
                f"tensor {name!r} must be one of the {len(self._stored)} in "
                f"{self.files[0]}; it is not there."
            )
        tensor = self._dequantised(name, self._stored[name])
        rule = ARCHITECTURES[self._architecture]
        if rule.permuted and ".self_attn." in name:
            for part, heads in (
                (".q_proj.", self.config["num_attention_heads"]),
                (".k_proj.", self.config["num_key_value_heads"]),
            ):
                if part in name:
                    tensor = rotate_half_rows(tensor, heads)
        if rule.shifted_norms and name.endswith("norm.weight"):
            tensor = tensor - np.float32(1)
        return tensor

    def pieces(self, name: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads one tensor and yields it as a single piece."""
        yield ..., self[name]

    def _dequantised(self, name: str, stored: Any) -> np.ndarray:
        library = _gguf()
        kind = library.GGMLQuantizationType(stored.kind)
        rows = self._data[stored.offset : stored.offset + stored.size]
        if stored.shape and stored.size:
            rows = rows.reshape(int(np.prod(stored.shape[:-1], dtype=np.int64)), -1)
        try:
            values = library.dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.files[0]}: tensor {name!r} is stored as {kind.name}, which the "
                "package gguf can't turn into floats. Take another quantisation of the "
                "model, such as Q8_0 or Q4_K."
            ) from error
        return np.array(values, np.float32, order="C").reshape(stored.shape)


def rotate_half_rows(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from interleaved RoPE (llama.cpp's llama) to rotate-half.

    Interleaved pairs are rows ``(2 j, 2 j + 1)`` of a head, rotate-half pairs ``(j,
    j + h / 2)``.

    Args:
      tensor: ``[n * h, ...]``, a projection's weight or bias.
      heads: how many heads ``n`` its rows hold.

    Returns:
      The same shape.

    Example:
      >>> rotate_half_rows(np.arange(8), heads=2).tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
