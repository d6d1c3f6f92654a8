"""Training examples for encoder–decoders: a source that is read, a target to write.

An example is ``input_ids``, the source, and ``labels``, the target: a text's tokens and
the end-of-text token, all of which count. The decoder is fed the target shifted by one,
after the model's start token.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.train.buckets import BUCKET_MULTIPLE, Batch, Schedule, pad_ids
from lora_jax.train.examples import check_keys, integers_of, read_jsonl, string_of
from lora_jax.train.text import IGNORED, TextEncoder, with_end

FIELDS = (("prompt", "completion"), ("input_ids", "labels"))
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")  # of the model

Record = Mapping[str, Any]
Example = dict[str, np.ndarray]


class PairEncoder(TextEncoder, Protocol):
    """Interface of a tokenizer, such as `lora_jax.files.tokenizer.Tokenizer`."""

    def encode(self, texts: Sequence[str]) -> Any:
        """Returns ``ids``, a list for each text, with special tokens."""
        ...


class Pair(NamedTuple):
    """A line's tokens.

    Attributes:
      source: what the encoder reads.
      target: what the decoder writes, to its end-of-text token.
    """

    source: list[int]
    target: list[int]


class PairData(NamedTuple):
    """The examples of a file.

    Attributes:
      examples: each with ``input_ids`` ``[s]`` and ``labels`` ``[t]``, int32; one for
        each line.
      truncated: number whose source or target was cut.
    """

    examples: list[Example]
    truncated: int


def read_pairs(
    path: str | os.PathLike[str],
    tokenizer: PairEncoder | None,
    *,
    max_length: int | None = None,
    vocab_size: int,
) -> PairData:
    """Reads a JSONL file for an encoder–decoder, strictly.

    Args:
      path: lines are ``{"prompt", "completion"}``, or the token ids of both,
        ``{"input_ids", "labels"}``.
      tokenizer: may be None for token ids.
      max_length: maximum tokens of a source and of a target. Of a longer source the
        last token is kept, which ends it; a longer target is cut at the end.
      vocab_size: ids must be below it.

    Returns:
      The examples, and how many were cut.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: listing file, line and reason for each bad line, up to 20.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2; got {max_length}.")
    pairs: list[Pair] = []

    def check(record: dict[str, Any]) -> None:
        pairs.append(encode_pair(record, tokenizer, vocab_size=vocab_size))

    read_jsonl(path, fields={}, check=check)
    limit = max_length or max(len(ids) for pair in pairs for ids in pair)
    examples = [
        {
            "input_ids": np.asarray(_shorten(pair.source, limit), np.int32),
            "labels": np.asarray(pair.target[:limit], np.int32),
        }
        for pair in pairs
    ]
    return PairData(examples, sum(max(map(len, pair)) > limit for pair in pairs))


def encode_pair(
    record: Record, tokenizer: PairEncoder | None, *, vocab_size: int
) -> Pair:
    """Encodes a line; see `read_pairs`.

    Raises:
      ValueError: if it has other keys, an empty text, or ids out of range.
      TypeError: if a value has the wrong type.
    """
    fields = next((own for own in FIELDS if any(key in record for key in own)), ())
    if not fields:
        kinds = "; or ".join(" and ".join(own) for own in FIELDS)
        raise ValueError(
            f"must hold {kinds}, as the model is an encoder–decoder; its keys are "
            f"{sorted(record)}"[:300]
        )
    check_keys(record, fields)
    if fields == FIELDS[0]:
        source, target = (string_of(record, key) for key in fields)
        pair = _from_texts(source, target, tokenizer)
    else:
        pair = Pair(*(integers_of(record, key) for key in fields))
        while pair.target and pair.target[-1] == IGNORED:  # Hugging Face's padding
            pair.target.pop()
    for key, ids in zip(fields, pair, strict=True):
        if not ids:
            raise ValueError(f"{key!r} must have at least 1 token; it has none")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"{key!r}: token ids must be in [0, {vocab_size}); got {min(ids)} to "
                f"{max(ids)}"
            )
    return pair


def encode_source(text: str, tokenizer: PairEncoder) -> list[int]:
    """Returns a source's tokens, with the special ones that the encoder expects."""
    return list(tokenizer.encode([text]).ids[0])


def _from_texts(source: str, target: str, tokenizer: PairEncoder | None) -> Pair:
    if tokenizer is None:
        raise ValueError("must be input_ids and labels: the model has no tokenizer")
    ids = with_end(list(tokenizer.encode_text(target).ids), tokenizer, "a target")
    return Pair(encode_source(source, tokenizer), ids)


def _shorten(ids: list[int], limit: int) -> list[int]:
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


class PairBatches(Schedule):
    """Batches for an encoder–decoder, each a pure function of the step number.

    A batch has ``input_ids`` and ``attention_mask`` ``[b, s]``, ``decoder_input_ids``
    and ``labels`` ``[b, t]`` int32, and ``weights`` ``[b, t]`` float32, 0 for padding.
    Buckets are lengths of sources; ``t`` is that of the longest target among the
    sources that fit a bucket, a multiple of 8.

    Attributes:
      targets: number of target tokens per epoch.
      token_fraction: fraction of an epoch's batches that is tokens, not padding.

    Args:
      examples: mappings with ``input_ids`` ``[s]`` and ``labels`` ``[t]``.
      batch_size: rows per batch.
      buckets: increasing lengths to pad sources to; `length_buckets` if None.
      start_id: the token that targets start from, see `EncoderDecoderConfig`.
      seed: seed of the shuffling.
      shuffle: False keeps the order within each bucket, for evaluation.

    Raises:
      ValueError: if there are no examples, one is empty or too long, or an argument is
        out of range.

    Example:
      >>> data = [{"input_ids": np.arange(2, 5), "labels": np.array([7, 1])}]
      >>> batch = PairBatches(data, 1, [4], start_id=0).batch_at(0)
      >>> batch["attention_mask"].tolist(), batch["decoder_input_ids"][0, :3].tolist()
      ([[1, 1, 1, 0]], [0, 7, 0])
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        buckets: Sequence[int] | None = None,
        *,
        start_id: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.start_id = start_id
        self._sources = [np.asarray(e["input_ids"], np.int32) for e in examples]
        self._targets = [np.asarray(e["labels"], np.int32) for e in examples]
        if empty := [i for i, ids in enumerate(self._targets) if not len(ids)][:20]:
            raise ValueError(
                f"every target must have at least 1 token; those at {empty} have 0."
            )
        sizes = [len(ids) for ids in self._sources]
        super().__init__(sizes, batch_size, buckets, seed=seed, shuffle=shuffle)
        lengths = np.array([len(ids) for ids in self._targets])
        self._widths = {
            bucket: -(
                -int(lengths[self.lengths <= bucket].max(initial=1)) // BUCKET_MULTIPLE
            )
            * BUCKET_MULTIPLE
            for bucket in self.buckets
        }
        self.targets = int(lengths.sum())
        widths = (n + self._widths[n] for n, _ in self._plan_epoch(0))
        tokens = int(self.lengths.sum()) + self.targets
        self.token_fraction = tokens / (sum(widths) * batch_size)

    def _pad(self, length: int, members: np.ndarray, count: int) -> Batch:
        sources = [self._sources[member] for member in members]
        targets = [self._targets[member] for member in members]
        ids, mask = pad_ids(sources, length, count)
        labels, is_target = pad_ids(targets, self._widths[length], count)
        is_target[len(members) :] = 0
        shifted = np.full_like(labels, self.start_id)
        shifted[:, 1:] = labels[:, :-1] * is_target[:, 1:]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": shifted,
            "labels": labels,
            "weights": is_target.astype(np.float32),
        }

    def _add_contents(self, digest: Any) -> None:
        digest.update(self.start_id.to_bytes(8, "little"))
        for source, target in zip(self._sources, self._targets, strict=True):
            digest.update(len(source).to_bytes(8, "little"))
            digest.update(source.astype("<i4").tobytes())
            digest.update(target.astype("<i4").tobytes())
