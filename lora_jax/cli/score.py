"""`lora-jax score`: log-probabilities of a file's tokens, a line in, a line out."""

import argparse
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_file, write_lines
from lora_jax.cli.pretrained import load_decoder
from lora_jax.finetune.formatting import perplexity, size
from lora_jax.finetune.lines import text_fault
from lora_jax.finetune.score import score
from lora_jax.train.data import read_jsonl


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Scores a file.

    Args:
      args: ``model``, ``adapter``, ``data``, ``out``, ``batch_size``.
      out: where to print.

    Returns:
      How many lines and tokens, and the mean log-probability of a token.
    """
    target = new_file(args.out, args.data)
    records = read_jsonl(args.data, fields={}, check=text_fault)
    loaded = load_decoder(args.model, args.adapter, is_scanned=True)
    scores = score(loaded, records, args.data, batch_size=args.batch_size, reporter=out)
    lines = [
        {"tokens": len(row) + 1, "logprobs": row.tolist(), "sum": float(row.sum())}
        for row in scores
    ]
    write_lines(target, lines)
    count = sum(len(row) for row in scores)
    mean = sum(line["sum"] for line in lines) / max(count, 1)
    out.say(
        f"{len(lines):,} lines, {count:,} scored tokens, mean log-probability "
        f"{mean:.4f} (perplexity {perplexity(-mean):.3f}), in {target} "
        f"({size(target.stat().st_size)})"
    )
    return {
        "lines": len(lines),
        "scored_tokens": count,
        "mean_logprob": mean,
        "perplexity": perplexity(-mean),
        "out": str(target),
    }
