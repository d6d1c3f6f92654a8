"""`lora-jax encode`: a line of text, token ids or an image in, one of numbers out."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.cli.console import Console
from lora_jax.cli.encode_images import Batch, image_batches, image_fault, is_image
from lora_jax.cli.jsonl import by_length, check_target, write_lines
from lora_jax.cli.pretrained import Pretrained, load
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size
from lora_jax.finetune.job import encode_texts
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.train.data import read_jsonl

MAX_FAULTS = 20


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Encodes a file.

    Args:
      args: ``model``, ``adapter``, ``data``, ``out``, ``batch_size``, ``max_length``.
      out: where to print.

    Returns:
      How many lines, and of what width.
    """
    target = check_target(args.out, args.data)
    records = read_jsonl(args.data, fields={})
    _check_records(records, args.data)
    model = load(args.model, args.adapter)
    _check_kind(model, records, args.data)
    rows, cut = min(args.batch_size, len(records)), 0
    if isinstance(config := model.loaded.config, ImageEncoderConfig):
        batches = image_batches(config, model.loaded.path, records, rows, args.data)
    else:
        max_length = args.max_length
        if max_length is None and model.extra is not None:
            max_length = model.extra.get("max_length")
        sequences, cut = _token_ids(model, records, max_length, args.data)
        batches = _text_batches(model, sequences, rows)

    lines: list[dict[str, Any]] = [{}] * len(records)
    with out.progress("encode", len(records)) as tick:
        for done in _encode(model, batches, lines):
            tick(done, "lines")
    write_lines(target, lines)
    width = model.loaded.config.hidden_size
    kinds = f"embedding of {width}" + (" and logits" if model.has_head else "")
    out.say(
        f"{len(lines):,} lines, each an {kinds}, in {target} "
        f"({size(target.stat().st_size)})" + (f"; {cut:,} were cut" if cut else "")
    )
    return {
        "lines": len(lines),
        "width": width,
        "has_logits": model.has_head,
        "truncated": cut,
        "out": str(target),
    }


def _check_records(records: Sequence[Mapping[str, Any]], path: str) -> None:
    """Raises, naming each line that is not what DESIGN's encoders read."""
    faults = []
    for number, record in enumerate(records, start=1):
        text, ids = record.get("text"), record.get("input_ids")
        mask = record.get("attention_mask")
        if is_image(record):
            if not (fault := image_fault(record)):
                continue
        elif ("text" in record) == ("input_ids" in record):
            fault = (
                "must have either 'text' or 'input_ids', or of an image 'image' or "
                "'pixel_values'"
            )
        elif text is not None and not isinstance(text, str):
            fault = f"'text' must be a string; got {type(text).__name__}"
        elif "input_ids" in record and not (_is_ints(ids) and ids):
            fault = "'input_ids' must be a list of integers, at least 1"
        elif mask is not None and not (
            _is_ints(mask) and ids and len(mask) == len(ids) and set(mask) <= {0, 1}
        ):
            fault = "'attention_mask' must be a 0 or 1 for each of 'input_ids'"
        else:
            continue
        faults.append(f"{path}, line {number}: {fault}")
    _raise(faults)


def _check_kind(
    model: Pretrained, records: Sequence[Mapping[str, Any]], path: str
) -> None:
    """Raises unless the model is an encoder, and of what the lines are."""
    config = model.loaded.config
    if not isinstance(config, (EncoderConfig, ImageEncoderConfig)):
        raise UserError(
            f"{model.loaded.path} must be an encoder, of text or of images; its config "
            f"is a {type(config).__name__}. Decoders have `generate` and `score`."
        )
    reads_images = isinstance(config, ImageEncoderConfig)
    wanted = "images ('image', 'pixel_values')" if reads_images else "text"
    _raise(
        [
            f"{path}, line {number}: the model reads {wanted}"
            for number, record in enumerate(records, start=1)
            if is_image(record) != reads_images
        ]
    )


def _raise(faults: Sequence[str]) -> None:
    if faults:
        more = len(faults) - MAX_FAULTS
        raise UserError(
            f"{len(faults)} bad lines\n  "
            + "\n  ".join(faults[:MAX_FAULTS])
            + (f"\n  and {more} more" if more > 0 else "")
        )


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _token_ids(
    model: Pretrained,
    records: Sequence[Mapping[str, Any]],
    max_length: int | None,
    path: str,
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Returns ids and mask of each line, and how many texts were cut."""
    texts = [record["text"] for record in records if "text" in record]
    encoded = (
        encode_texts(model.loaded, texts, max_length=max_length) if texts else None
    )
    ids = iter(encoded.ids if encoded else [])
    config = model.loaded.config
    sequences, faults = [], []
    for number, record in enumerate(records, start=1):
        tokens = next(ids) if "text" in record else record["input_ids"]
        mask = record.get("attention_mask") if "input_ids" in record else None
        sequences.append((tokens, mask or [1] * len(tokens)))
        if len(tokens) > config.max_positions:
            faults.append(
                f"{path}, line {number}: {len(tokens)} ids; the model takes at most "
                f"{config.max_positions}"
            )
        elif not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            faults.append(
                f"{path}, line {number}: ids must be in [0, {config.vocab_size}); got "
                f"{min(tokens)} to {max(tokens)}"
            )
    if faults:
        raise UserError("bad token ids\n  " + "\n  ".join(faults[:MAX_FAULTS]))
    return sequences, encoded.truncated if encoded else 0


def _text_batches(
    model: Pretrained, sequences: Sequence[tuple[list[int], list[int]]], rows: int
) -> Iterator[Batch]:
    """Yields indices of lines with their ids and masks, shortest first."""
    lengths = [len(ids) for ids, _ in sequences]
    longest = model.loaded.config.max_positions
    for members, width in by_length(lengths, rows, longest):
        ids, mask = (np.zeros((rows, width), np.int32) for _ in range(2))
        mask[len(members) :, 0] = 1  # filler attends to something
        for row, member in enumerate(members):
            ids[row, : lengths[member]], mask[row, : lengths[member]] = sequences[
                member
            ]
        yield members, (ids, mask)


def _encode(
    model: Pretrained, batches: Iterable[Batch], lines: list[dict[str, Any]]
) -> Iterator[int]:
    """Fills ``lines`` batch by batch; yields how many are done."""

    def forward(variables, *inputs):
        apply = model.loaded.module.apply
        embedding = apply(variables, *inputs, method="embed")
        return embedding, apply(variables, *inputs) if model.has_head else None

    compiled, done = jax.jit(forward), 0
    for members, inputs in batches:
        embedding, logits = jax.device_get(compiled(model.variables, *inputs))
        for row, member in enumerate(members):
            line = {"embedding": embedding[row].tolist()}
            if logits is not None:
                line["logits"] = logits[row].tolist()
            lines[member] = line
        done += len(members)
        yield done
