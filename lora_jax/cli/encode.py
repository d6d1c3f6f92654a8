"""`lora-jax encode`: computes embeddings of text, token ids or images."""

import argparse
from typing import Any

from lora_jax.cli.adapters import load_lines
from lora_jax.cli.console import Console
from lora_jax.cli.outputs import new_file, write_lines
from lora_jax.cli.pretrained import load
from lora_jax.finetune.encode import encode, record_fault
from lora_jax.finetune.formatting import size
from lora_jax.names import CLASSIFIER


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Encodes a file; returns the number of lines and the embedding size."""
    target = new_file(args.out, args.data)
    records, loaded, choose = load_lines(args, record_fault, load)
    lines, cut = encode(
        loaded,
        records,
        args.data,
        batch_size=args.batch_size,
        choose=choose,
        max_length=args.max_length or (loaded.extra or {}).get("max_length"),
        prompt=args.prompt,
        reporter=out,
    )
    write_lines(target, lines)
    width = len(lines[0]["embedding"]) if lines else loaded.config.hidden_size
    has_head = CLASSIFIER in loaded.params
    kinds = f"embedding of {width}" + (" and logits" if has_head else "")
    out.say(
        f"{len(lines):,} lines, each an {kinds}, in {target} "
        f"({size(target.stat().st_size)})" + (f"; {cut:,} truncated" if cut else "")
    )
    return {
        "lines": len(lines),
        "width": width,
        "has_logits": has_head,
        "truncated": cut,
        "out": str(target),
    }
