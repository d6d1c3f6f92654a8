"""`lora-jax encode`: a line of text or token ids in, a line of numbers out."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.cli.console import Console, UserError, size
from lora_jax.cli.job import encode_texts
from lora_jax.cli.pretrained import Pretrained, load
from lora_jax.train.data import length_buckets, read_jsonl

MAX_FAULTS = 20


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Encodes a file.

    Args:
      args: ``model``, ``adapter``, ``data``, ``out``, ``batch_size``, ``max_length``.
      out: where to print.

    Returns:
      How many lines, and of what width.
    """
    target = Path(args.out)
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}.")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; it must be a file.")
    if target.exists() and target.samefile(args.data):
        raise UserError(f"--out {target} is the data file itself; name another file.")
    records = read_jsonl(args.data, fields={})
    _check_records(records, args.data)
    model = load(args.model, args.adapter)
    max_length = args.max_length
    if max_length is None and model.extra is not None:
        max_length = model.extra.get("max_length")
    sequences, cut = _token_ids(model, records, max_length, args.data)

    lines: list[str] = [""] * len(records)
    with out.progress("encode", len(records)) as tick:
        for rows in _encode(model, sequences, args.batch_size, lines):
            tick(rows, "lines")
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(target)
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
        if "image" in record or "pixel_values" in record:
            fault = "images need a vision model; supported are text encoders (BERT)"
        elif ("text" in record) == ("input_ids" in record):
            fault = "must have either 'text' or 'input_ids'"
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


def _encode(
    model: Pretrained,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    lines: list[str],
):
    """Fills ``lines`` batch by batch, shortest first; yields how many are done."""

    def forward(variables, ids, mask):
        apply = model.loaded.module.apply
        embedding = apply(variables, ids, mask, method="embed")
        return embedding, apply(variables, ids, mask) if model.has_head else None

    compiled = jax.jit(forward)
    lengths = np.array([len(ids) for ids, _ in sequences])
    buckets = [
        min(b, model.loaded.config.max_positions)
        for b in length_buckets(lengths.tolist())
    ]
    rows = min(batch_size, len(sequences))
    order, done = np.argsort(lengths, kind="stable"), 0
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        width = next(b for b in buckets if b >= lengths[members].max())
        ids, mask = (np.zeros((rows, width), np.int32) for _ in range(2))
        mask[len(members) :, 0] = 1  # filler attends to something
        for row, member in enumerate(members):
            ids[row, : lengths[member]], mask[row, : lengths[member]] = sequences[
                member
            ]
        embedding, logits = jax.device_get(compiled(model.variables, ids, mask))
        for row, member in enumerate(members):
            line = {"embedding": embedding[row].tolist()}
            if logits is not None:
                line["logits"] = logits[row].tolist()
            lines[member] = json.dumps(line)
        done += len(members)
        yield done
