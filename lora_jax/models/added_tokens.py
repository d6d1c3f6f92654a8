"""A model on disk whose vocabulary gets new tokens.

The tokenizer gives them the ids after its own. Their rows of the embedding, and of a
head that is not tied to it, are the mean of the other rows (transformers draws them
around it, so closely that they differ by rounding). A table that has rows to spare, as
many have, keeps its size.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.files.special_tokens import TOKENIZER_CONFIG
from lora_jax.files.tokenizer import Tokenizer, load_tokenizer
from lora_jax.models.source import TIED_HEAD, Source, open_source
from lora_jax.names import EMBED, EMBEDDING, HEAD

ADDED = "added_tokens"  # in what is saved beside an adapter
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")


class GrownReader:
    """A reader of tensors, some of which have new rows.

    Attributes:
      shapes: from each tensor's name to its shape, new rows included.

    Args:
      reader: of the tensors as they are stored.
      names: the tensors that have a row for each token.
      ids: the ids of new tokens.
    """

    def __init__(self, reader: Any, names: Sequence[str], ids: Sequence[int]):
        self._reader, self._names, self._ids = reader, names, sorted(ids)
        self.shapes = dict(reader.shapes)
        for name in names:
            rows, *others = self.shapes[name]
            self.shapes[name] = (max(rows, self._ids[-1] + 1), *others)

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor into memory."""
        if name not in self._names:
            return self._reader[name]
        return np.concatenate([rows for _, rows in self.pieces(name)])

    def pieces(self, name: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads a tensor some rows at a time."""
        if name not in self._names:
            yield from self._reader.pieces(name)
            return
        stored, mean = self._reader.shapes[name][0], self._mean(name)
        for where, piece in self._reader.pieces(name):
            start = 0 if where is ... else where.start
            rows = slice(start, start + len(piece))
            inside = [i - start for i in self._ids if rows.start <= i < rows.stop]
            if inside:
                piece = piece.copy()
                piece[inside] = mean
            yield rows, piece
        if (beyond := self.shapes[name][0] - stored) > 0:
            rows = slice(stored, stored + beyond)
            yield rows, np.broadcast_to(mean, (beyond, *mean.shape))

    def _mean(self, name: str) -> np.ndarray:
        """Returns the mean of the rows before the new ones, in the tensor's dtype."""
        total, first, dtype = 0, self._ids[0], None
        for where, piece in self._reader.pieces(name):
            start = 0 if where is ... else where.start
            dtype = piece.dtype
            total = total + piece[: max(first - start, 0)].sum(axis=0, dtype=np.float64)
        count = min(first, self._reader.shapes[name][0])
        return np.asarray(total / count, np.float32).astype(dtype)


def open_grown(
    path: str | os.PathLike[str], tokens: Sequence[str]
) -> tuple[Source, Tokenizer | None]:
    """Opens a model as `open_source` does, with new tokens if there are any.

    Returns:
      The model, and the tokenizer with the new tokens; None if there are none.
    """
    source = open_source(path)
    return add_tokens(source, tokens) if tokens else (source, None)


def add_tokens(source: Source, tokens: Sequence[str]) -> tuple[Source, Tokenizer]:
    """Returns a decoder and its tokenizer with new tokens.

    Args:
      source: the model on disk, which stays as it is.
      tokens: their texts.

    Raises:
      ValueError: if the model isn't a decoder, has no tokenizer, or other tables with a
        row for each token; listing every token that is empty, given twice or known
        already.
    """
    family, config = source.family, source.config
    if family.kind != "decoder" or config.per_layer_size is not None:
        raise ValueError(
            f"add_tokens must be empty for {source.path}: only a decoder with one "
            "table of tokens can get new ones."
        )
    tokenizer = grow_tokenizer(load_tokenizer(source.path), tokens, str(source.path))
    ids = [tokenizer.token_id(token) or 0 for token in tokens]
    bare = (family.tensor_name(f"{EMBED}/{EMBEDDING}"), TIED_HEAD)
    names = [source.names[name] for name in bare if name in source.names]
    tensors = GrownReader(source.tensors, names, ids)
    size = max((tensors.shapes[name][0] for name in names), default=0)
    return (
        source._replace(tensors=tensors, settings=_resized(source.settings, size)),
        tokenizer,
    )


def grow_tokenizer(
    tokenizer: Tokenizer | None, tokens: Sequence[str], where: str
) -> Tokenizer:
    """Adds new tokens to a tokenizer, which is changed; see `add_tokens`."""
    if tokenizer is None:
        raise ValueError(
            f"add_tokens must be empty for {where}: it has no tokenizer.json to add "
            "them to."
        )
    faults = []
    for token in dict.fromkeys(tokens):
        if list(tokens).count(token) > 1:
            faults.append(f"{token!r} is given twice")
        if not token.strip() or token != token.strip():
            faults.append(f"{token!r} must not be blank, nor start or end with a space")
        elif (known := tokenizer.token_id(token)) is not None:
            faults.append(
                f"{token!r} is a token already, {known}; train its row by lora.tokens"
            )
    if faults:
        raise ValueError(f"add_tokens: {'; '.join(faults)}.")
    tokenizer.add_tokens(tokens)
    return tokenizer


def new_tokens(folder: Path, source: Source) -> list[str]:
    """Returns the tokens that an adapter folder's tokenizer has and the model's lacks.

    Raises:
      ValueError: if their ids don't follow those of the model's own tokens.
    """
    own, theirs = load_tokenizer(source.path), load_tokenizer(folder)
    if own is None or theirs is None:
        return []
    new = {t: theirs.token_id(t) or 0 for t in theirs.added_tokens}
    new = {t: i for t, i in new.items() if own.token_id(t) is None}
    tokens = sorted(new, key=lambda token: new[token])
    own.add_tokens(tokens)
    if wrong := [t for t in tokens if own.token_id(t) != new[t]]:
        raise ValueError(
            f"{theirs.path} must continue the ids of {own.path}; the new tokens "
            f"{wrong[:20]} have others. Load the base that the adapter was trained on."
        )
    return tokens


def write_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path) -> None:
    """Writes a tokenizer with new tokens, for transformers, beside an adapter or model.

    Args:
      folder: to write to.
      tokenizer: with the new tokens.
      source: the model's folder or GGUF file, of which the other files of a tokenizer
        are copied.
    """
    if source.is_file():
        tokenizer.save(folder)
        return
    for name in BESIDE:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    tokenizer.save_vocabulary(folder)


def train_added(
    config: LoRAConfig, ids: Sequence[int], *, is_tied: bool
) -> dict[str, tuple[int | str, ...]]:
    """Returns ``config.tokens`` by layer with the rows of new tokens.

    Args:
      config: in the model's own names.
      ids: of the new tokens.
      is_tied: whether the head is the embedding.
    """
    tokens = dict(config.tokens_by_layer)
    for layer in (EMBED,) if is_tied else (EMBED, HEAD):
        if ids and not config.is_trained(f"{layer}/", is_adapted=False):
            tokens[layer] = tuple(dict.fromkeys((*tokens.get(layer, ()), *ids)))
    return tokens


def _resized(settings: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns a ``config.json`` for so many tokens."""
    inner = settings.get("text_config")
    if isinstance(inner, Mapping):
        settings = {**settings, "text_config": {**inner, "vocab_size": size}}
        if "vocab_size" not in settings:
            return settings
    return {**settings, "vocab_size": size}
