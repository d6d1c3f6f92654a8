"""`lora-jax score`: log-probabilities of the tokens in a file."""

import argparse
from typing import Any

from lora_jax.cli.adapters import load_lines
from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_file, write_lines
from lora_jax.cli.pretrained import load_decoder
from lora_jax.finetune.formatting import perplexity, size
from lora_jax.finetune.score import Scored, score, score_fault


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Scores a file; returns the counts and the mean log-probability."""
    target = new_file(args.out, args.data)
    records, loaded, choose = load_lines(
        args, score_fault, load_decoder, scan_layers=True
    )
    scores = score(
        loaded,
        records,
        args.data,
        batch_size=args.batch_size,
        choose=choose,
        reporter=out,
    )
    lines = [_line(row, records[row.line]) for row in scores]
    write_lines(target, lines)
    count = sum(int(row.counted.sum()) for row in scores)
    mean = sum(line["sum"] for line in lines) / max(count, 1)
    out.say(
        f"{len(records):,} lines, {count:,} scored tokens, mean log-probability "
        f"{mean:.4f} (perplexity {perplexity(-mean):.3f}), in {target} "
        f"({size(target.stat().st_size)})"
    )
    return {
        "lines": len(records),
        "scored_tokens": count,
        "mean_logprob": mean,
        "perplexity": perplexity(-mean),
        "out": str(target),
    }


def _line(row: Scored, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the output for a line's tokens.

    For training data, which may give several per line, it includes the line number and
    which tokens count.
    """
    found = {
        "tokens": row.tokens,
        "logprobs": row.logprobs.tolist(),
        "sum": float(row.logprobs[row.counted == 1].sum()),
    }
    if "text" in record or "input_ids" in record:
        return found
    return {"line": row.line + 1, **found, "loss_mask": row.counted.tolist()}
