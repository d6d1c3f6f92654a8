"""Perplexity of SmolLM2-135M on prose: `lora-jax score` against transformers.

Both read the same 4-bit file and compute in float32. The texts are New York Times
editorials from VADER's ground truth, each scored separately from its second token.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fetch import smollm2


def main(quick: bool) -> list[dict[str, Any]]:
    """Scores the editorials with both.

    Args:
      quick: fewer editorials.

    Returns:
      One row.
    """
    from experiments.vader import load_editorials

    texts = load_editorials()[: 3 if quick else 50]
    ours, ids = _by_lora_jax(texts)
    theirs = _by_transformers(ids)
    count = sum(len(row) - 1 for row in ids)
    means = [
        np.array([total / (len(row) - 1) for total, row in zip(sums, ids, strict=True)])
        for sums in (ours, theirs)
    ]
    row = {
        "what": f"{len(texts)} editorials",
        "scored_tokens": count,
        "perplexity": math.exp(-sum(ours) / count),
        "perplexity_transformers": math.exp(-sum(theirs) / count),
        "largest_difference": float(np.abs(means[0] - means[1]).max()),
    }
    return [row]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| SmolLM2-135M-Instruct, Q4_1, on | scored tokens | perplexity | by "
        "transformers | largest difference of a text's mean log-probability |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['scored_tokens']:,} | {row['perplexity']:.3f} | "
        f"{row['perplexity_transformers']:.3f} | {row['largest_difference']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def _by_lora_jax(texts: list[str]) -> tuple[list[float], list[list[int]]]:
    """Returns each text's sum of log-probabilities, and its token ids."""
    from lora_jax.cli import score
    from lora_jax.cli.console import Console
    from lora_jax.files.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2())
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        words = argparse.Namespace(
            model=str(smollm2()),
            adapter=None,
            data=str(data),
            out=str(out),
            batch_size=4,
        )
        score.run(words, Console(as_json=True))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    return (
        [line["sum"] for line in lines],
        [tokenizer.encode_text(text).ids for text in texts],
    )


def _by_transformers(ids: list[list[int]]) -> list[float]:
    """Returns each text's sum of log-probabilities, by transformers."""
    import torch
    import transformers

    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    sums = []
    with torch.no_grad():
        for row in ids:
            tokens = torch.tensor([row])
            found = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
            sums.append(found.gather(1, tokens[0, 1:, None]).sum().item())
    return sums
