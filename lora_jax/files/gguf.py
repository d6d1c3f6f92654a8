"""GGUF files: llama.cpp's models, with Hugging Face's names and layout.

Names, shapes, row order and config are those of a Hugging Face folder, so one loader
reads both. Tensors are dequantised to float32 one at a time on access: the result is
the rounded model, not the original one.

Three changes by llama.cpp's converter are undone: it permutes the rows of ``q_proj``
and ``k_proj`` of the *llama* and *granite* architectures from rotate-half to
interleaved RoPE, it adds the 1 of Gemma's ``(1 + weight)`` to its norms, and it stacks
the experts of a layer, which are read one by one.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.gguf_config import ROPE_FACTORS, hugging_face_config
from lora_jax.files.gguf_header import Header, read_header
from lora_jax.files.gguf_names import ARCHITECTURES, architecture_of, hugging_face_name
from lora_jax.files.optional import load_optional

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # as named by gguf-split
MAX_PARTS = 1000
MAX_EXPERTS = 4096  # of a layer


def _gguf() -> Any:
    return load_optional("reading GGUF files", "gguf")


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads a GGUF file's fields by their own keys.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or not a GGUF file.
    """
    return _read_header(path).metadata


def first_part(path: Path) -> Path:
    """Returns a split model's first file if it exists (it has the config), or ``path``.

    ``path`` may be any of its files, or that of a whole model.
    """
    found = _PART.fullmatch(path.name)
    first = path.with_name(f"{found[1]}-00001-of-{found[3]}{SUFFIX}") if found else path
    return first if first.is_file() else path


def _read_header(path: Path) -> Header:
    sizes = {int(k): v for k, v in _gguf().GGML_QUANT_SIZES.items()}
    return read_header(path, sizes)


def _read_parts(path: Path) -> tuple[list[Path], list[Header]]:
    """Reads the headers of a model's files: one, or the parts made by gguf-split."""
    files = [first_part(path)]
    headers = [_read_header(files[0])]
    count = headers[0].metadata.get("split.count", 1)
    if isinstance(count, int) and count < 2:
        return files, headers
    found = _PART.fullmatch(files[0].name)
    if not isinstance(count, int) or not found or int(found[3]) != count:
        raise ValueError(
            f"{path} is part of a split model, whose files must be named "
            f"NAME-00001-of-{str(count)[:5]:0>5}{SUFFIX} and so on. Rename them, or "
            "join them with `llama-gguf-split --merge`."
        )
    parts = range(2, min(count, MAX_PARTS) + 1)
    files += [path.with_name(f"{found[1]}-{i:05}-of-{found[3]}{SUFFIX}") for i in parts]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} is one of {count} files of a split model, which must be in one "
            f"folder; {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"in {path.parent}. Download the rest."
        )
    headers += [_read_header(file) for file in files[1:]]
    for file, header, number in zip(files, headers, range(count), strict=True):
        if header.metadata.get("split.no") != number:
            raise ValueError(
                f"{file} must be file {number + 1} of {count} according to its "
                f"metadata; its split.no is {header.metadata.get('split.no')!r}, "
                "counted from 0."
            )
    return files, headers


class GGUFReader:
    """The tensors and config of a GGUF file, with Hugging Face's names.

    It has the interface of `lora_jax.files.safetensors.TensorReader`. The tokenizer is
    read by `lora_jax.files.gguf_tokenizer`.

    Attributes:
      files: the file, or all files of a split model.
      shapes: shapes by Hugging Face tensor name, ``(out, in)``.
      metadata: the file's fields, by their own keys.
      config: the equivalent of ``config.json``.

    Args:
      path: the file, or any part of a model split by gguf-split.

    Raises:
      FileNotFoundError: if the file, or another part of it, does not exist.
      ValueError: if it is damaged or not a model, or its architecture or one of its
        tensors is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        files, headers = _read_parts(path)
        self.files = tuple(files)
        self.metadata: dict[str, Any] = headers[0].metadata
        if self.metadata.get("general.type", "model") == "adapter":
            raise ValueError(
                f"{path} must be a model; it is a GGUF LoRA adapter. "
                "Adapters are read from folders of lora_jax, PEFT and mlx-lm: use the "
                "one that it was converted from."
            )
        self._architecture = architecture_of(path, self.metadata)
        tensors = {n: (t, h.data) for h in headers for n, t in h.tensors.items()}
        if len(tensors) < sum(len(header.tensors) for header in headers):
            raise ValueError(f"{path}: each tensor must be in only one of its files.")
        named = {name: hugging_face_name(name, self._architecture) for name in tensors}
        unknown = sorted(
            n for n, known in named.items() if known is None and n != ROPE_FACTORS
        )
        if unknown:
            raise ValueError(
                f"{path} must contain tensors of the architecture "
                f"{self._architecture!r}; {len(unknown)} of {len(named)} are "
                f"unknown: {unknown[:8]}. Use the model's Hugging Face folder instead."
            )
        self._stored = {
            single: (part, data)
            for n, known in named.items()
            if known
            for stored, data in [tensors[n]]
            for single, part in _single_experts(known, stored, path)
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            name: stored.shape for name, (stored, _) in self._stored.items()
        }
        factors = tensors.get(ROPE_FACTORS)
        self.config = hugging_face_config(
            path,
            self.metadata,
            self.shapes,
            None if factors is None else self._dequantised(ROPE_FACTORS, *factors),
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory, as float32."""
        if name not in self._stored:
            raise ValueError(
                f"tensor {name!r} must be one of the {len(self._stored)} in "
                f"{self.files[0]}."
            )
        tensor = self._dequantised(name, *self._stored[name])
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
        """Yields a tensor as a single piece."""
        yield ..., self[name]

    def _dequantised(self, name: str, stored: Any, data: np.ndarray) -> np.ndarray:
        library = _gguf()
        kind = library.GGMLQuantizationType(stored.kind)
        rows = data[stored.offset : stored.offset + stored.size]
        if stored.shape and stored.size:
            rows = rows.reshape(int(np.prod(stored.shape[:-1], dtype=np.int64)), -1)
        try:
            values = library.dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.files[0]}: tensor {name!r} is stored as {kind.name}, which the "
                "gguf package can't dequantise. Use another quantisation of the model, "
                "such as Q8_0 or Q4_K."
            ) from error
        return np.array(values, np.float32, order="C").reshape(stored.shape)


def _single_experts(name: str, stored: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the part of each expert, if a tensor is that of all, or the whole."""
    if "{e}" not in name:
        yield name, stored
        return
    count, *shape = stored.shape or (0,)
    if count > MAX_EXPERTS:
        raise ValueError(
            f"{name} must be of {MAX_EXPERTS} experts or less; got {count}."
        )
    for number in range(count):
        each = stored.size // count
        yield (
            name.format(e=number),
            stored._replace(
                shape=tuple(shape), offset=stored.offset + number * each, size=each
            ),
        )


def rotate_half_rows(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from interleaved RoPE (llama.cpp's llama) to rotate-half.

    Interleaved pairs are rows ``(2 j, 2 j + 1)`` of a head, rotate-half pairs ``(j,
    j + h / 2)``. ``tensor`` is the ``[n * h, ...]`` weight or bias of ``heads`` heads.

    Example:
      >>> rotate_half_rows(np.arange(8), heads=2).tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
