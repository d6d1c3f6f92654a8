"""`lora-jax score`: log-probabilities of a file's tokens, a line in, a line out."""

import argparse
from typing import Any

import jax
import numpy as np

from lora_jax.cli.console import Console
from lora_jax.cli.jsonl import by_length, check_target, write_lines
from lora_jax.cli.pretrained import Pretrained, load_decoder
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size
from lora_jax.train.causal_lm import chunk_tokens
from lora_jax.train.data import read_jsonl


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Scores a file.

    Args:
      args: ``model``, ``adapter``, ``data``, ``out``, ``batch_size``.
      out: where to print.

    Returns:
      How many lines and tokens, and the mean log-probability of a token.
    """
    target = check_target(args.out, args.data)
    records = read_jsonl(args.data, fields={}, check=_fault)
    model = load_decoder(args.model, args.adapter, scan_layers=True)
    sequences = _token_ids(model, records, args.data)
    scores: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    with out.progress("score", len(sequences)) as tick:
        for done in _score(model, sequences, args.batch_size, scores):
            tick(done, "lines")
    lines = [
        {"tokens": len(row) + 1, "logprobs": row.tolist(), "sum": float(row.sum())}
        for row in scores
    ]
    write_lines(target, lines)
    count = sum(len(row) for row in scores)
    mean = sum(line["sum"] for line in lines) / max(count, 1)
    out.say(
        f"{len(lines):,} lines, {count:,} scored tokens, mean log-probability "
        f"{mean:.4f} (perplexity {np.exp(-mean):.3f}), in {target} "
        f"({size(target.stat().st_size)})"
    )
    return {
        "lines": len(lines),
        "scored_tokens": count,
        "mean_logprob": mean,
        "perplexity": float(np.exp(-mean)),
        "out": str(target),
    }


def _fault(record: dict[str, Any]) -> str:
    if ("text" in record) == ("input_ids" in record):
        return f"must have 'text' or 'input_ids'; its keys are {sorted(record)}"[:200]
    if "text" in record and not isinstance(record["text"], str):
        return f"'text' must be str; got {record['text']!r}"[:200]
    ids = record.get("input_ids", [0])
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        return f"'input_ids' must be a list of integers; got {ids!r}"[:200]
    return ""


def _token_ids(
    model: Pretrained, records: list[dict[str, Any]], source: str
) -> list[list[int]]:
    loaded, sequences, faults = model.loaded, [], []
    config = loaded.config
    for number, record in enumerate(records, start=1):
        if "input_ids" in record:
            ids = record["input_ids"]
        elif loaded.tokenizer is None:
            raise UserError(f"{loaded.path} has no tokenizer; {source} must hold ids.")
        else:
            ids = loaded.tokenizer.encode_text(record["text"]).ids
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            faults.append(
                f"{source}: example {number}: ids must be in [0, {config.vocab_size}); "
                f"got {min(ids)} to {max(ids)}"
            )
        if not 1 <= len(ids) <= config.max_positions:
            faults.append(
                f"{source}: example {number}: must have 1 to {config.max_positions} "
                f"tokens, the model's context; got {len(ids)}"
            )
        sequences.append(ids)
    if faults:
        raise UserError("\n  ".join(["bad token ids", *faults[:20]]))
    return sequences


def _score(
    model: Pretrained,
    sequences: list[list[int]],
    batch_size: int,
    scores: list[np.ndarray],
):
    """Fills ``scores`` batch by batch, shortest first; yields how many are done."""

    apply, config = model.loaded.module.apply, model.loaded.config
    chunk = chunk_tokens(config.vocab_size)

    @jax.jit
    def log_probabilities(variables, ids):
        hidden: Any = apply(variables, ids, method="hidden")
        hidden = hidden[:, :-1]
        labels = ids[:, 1:]
        count = labels.size

        def of_token(pair):  # `chunk` of them at once: [b, t, v] never exists
            h, label = pair
            logits: Any = apply(variables, h[None, None], method="logits")
            return jax.nn.log_softmax(logits[0, 0])[label]

        tokens = (hidden.reshape(count, -1), labels.reshape(count))
        found = jax.lax.map(of_token, tokens, batch_size=chunk)
        return found.reshape(labels.shape)

    lengths = [len(ids) for ids in sequences]
    rows, done = min(batch_size, len(sequences)), 0
    for members, width in by_length(lengths, rows, config.max_positions):
        ids = np.zeros((rows, width), np.int32)
        for row, member in enumerate(members):
            ids[row, : lengths[member]] = sequences[member]
        found = np.asarray(log_probabilities(model.variables, ids))
        for row, member in enumerate(members):
            scores[member] = found[row, : lengths[member] - 1]
        done += len(members)
        yield done
