"""Encoding texts, token ids or images as embeddings, and logits if there is a head."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.images import image_batches, image_fault, is_image
from lora_jax.finetune.lines import (
    Batch,
    Choose,
    by_length,
    check_faults,
    check_ids,
    is_ints,
    text_fault,
)
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.texts import encode_texts, with_prompt
from lora_jax.models.dual import DualConfig, TextTowerConfig
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.sentence_config import MODULES
from lora_jax.names import CLASSIFIER


class Encoded(NamedTuple):
    """Encoded lines.

    Attributes:
      lines: the ``"embedding"`` of each line and, if there is a head, its ``"logits"``.
      truncated: number of truncated texts.
    """

    lines: list[dict[str, list[float]]]
    truncated: int


def record_fault(record: Mapping[str, Any]) -> str:
    """Returns an error message for a line to encode; empty if it is valid."""
    if is_image(record):
        return image_fault(record)
    if not {"text", "input_ids"} & record.keys():
        return "must have 'text', 'input_ids', or for images 'image' or 'pixel_values'"
    if fault := text_fault(record):
        return fault
    ids, mask = record.get("input_ids"), record.get("attention_mask")
    if mask is None or (
        ids and is_ints(mask) and len(mask) == len(ids) and set(mask) <= {0, 1}
    ):
        return ""
    return "'attention_mask' must have a 0 or 1 per 'input_ids' entry"


def encode(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    path: str,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    prompt: str | None = None,
    choose: Choose | None = None,
    reporter: Reporter | None = None,
) -> Encoded:
    """Encodes lines, all of them text (or token ids) or all images.

    Args:
      loaded: an encoder, or an encoder–decoder, of which the encoder is used.
      records: the lines, valid according to `record_fault`.
      path: their file, for error messages and relative image paths.
      batch_size: lines per batch.
      max_length: maximum tokens per text; None for that of the folder of
        sentence-transformers, else the model's context length.
      prompt: name of the folder's prompt to put before each text; None for its
        default one, if it has one.
      choose: returns the variables of a batch of lines; None for the model's own.
      reporter: shows the progress.

    Returns:
      The lines' embeddings, in order.

    Raises:
      UserError: if the model is a decoder without a `SentenceConfig`, a line is not
        the model's input type, or there is no such prompt.
    """
    config, sentence = loaded.config, loaded.sentence
    is_dual = isinstance(config, DualConfig)
    is_encoder = is_dual or isinstance(config, (EncoderConfig, ImageEncoderConfig))
    reads_both_ways = is_encoder or isinstance(config, EncoderDecoderConfig)
    if not reads_both_ways and sentence is None:
        raise UserError(
            f"{loaded.path} must be a text or image encoder; its config is a "
            f"{type(config).__name__}, and there is no {MODULES} that says how it "
            "makes embeddings. For decoders use `generate` and `score`."
        )
    texts = with_prompt(loaded, [r["text"] for r in records if "text" in r], prompt)
    pixels = config if isinstance(config, ImageEncoderConfig) else None
    if isinstance(config, DualConfig) and any(map(is_image, records[:1])):
        pixels = config.vision  # all lines are as the first
    reads_images = pixels is not None
    wanted = "images ('image', 'pixel_values')" if reads_images else "text"
    faults = [
        f"{path}: example {number}: the model reads {wanted}"
        + ", as in the first line" * is_dual
        for number, record in enumerate(records, start=1)
        if is_image(record) != reads_images
    ]
    check_faults("bad lines", faults)
    rows, truncated = min(batch_size, len(records)), 0
    if pixels is not None:
        batches = image_batches(pixels, loaded.path, records, rows, path)
    else:
        longest = max_length or (sentence and sentence.max_length)
        sequences, truncated = _token_ids(loaded, records, texts, longest)
        check_ids(sequences, config, path)
        has_texts = isinstance(config, (DualConfig, TextTowerConfig))
        if has_texts and config.is_siglip:  # padded as it was trained
            longest = config.max_positions
            own = isinstance(config, TextTowerConfig)
            pad = config.fill_id if own else config.padding_id
            sequences = [ids + [pad] * (longest - len(ids)) for ids in sequences]
        longest = loaded.config.max_positions
        batches = _text_batches(sequences, records, rows, longest)

    def forward(variables, *inputs):
        apply = loaded.module.apply
        embedding = apply(variables, *inputs, method=method)
        has_head = CLASSIFIER in loaded.params
        return embedding, apply(variables, *inputs) if has_head else None

    method = "embed" if is_encoder else "encode"  # a decoder's `embed` is a table
    method = "embed_image" if is_dual and reads_images else method
    compiled, done = jax.jit(forward), 0
    lines: list[dict[str, list[float]]] = [{}] * len(records)
    with (reporter or Reporter()).progress("encode", len(records)) as tick:
        for members, inputs in batches:
            variables = loaded.variables
            if choose is not None:
                variables = choose(members.tolist(), rows)
            embedding, logits = jax.device_get(compiled(variables, *inputs))
            for row, member in enumerate(members):
                lines[member] = {"embedding": embedding[row].tolist()}
                if logits is not None:
                    lines[member]["logits"] = logits[row].tolist()
            done += len(members)
            tick(done, "lines")
    return Encoded(lines, truncated)


def _token_ids(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    texts: list[str],
    max_length: int | None,
) -> tuple[list[list[int]], int]:
    """Returns the ids of each line, and the number of truncated texts."""
    if not texts:
        return [record["input_ids"] for record in records], 0
    encoded = encode_texts(loaded, texts, max_length=max_length)
    ids = iter(encoded.ids)
    sequences = [next(ids) if "text" in r else r["input_ids"] for r in records]
    return sequences, encoded.truncated


def _text_batches(
    sequences: Sequence[list[int]],
    records: Sequence[Mapping[str, Any]],
    rows: int,
    longest: int,
) -> Iterator[Batch]:
    """Yields ids and masks, shortest first."""
    masks = [
        ("input_ids" in record and record.get("attention_mask")) or [1] * len(ids)
        for ids, record in zip(sequences, records, strict=True)
    ]
    for members, (ids, mask) in by_length(rows, longest, sequences, masks):
        mask[len(members) :, 0] = 1  # filler rows must not be fully masked
        yield members, (ids, mask)
