"""Sentiment classification: is a sentence from a film review positive or negative?

    python -m experiments.sentiment.train
    python -m experiments.sentiment.train lora.rank=4 output.dir=runs/rank-4

Downloads all-MiniLM-L6-v2 and VADER's sentences to the cache, writes the three splits
there as JSONL files, and runs ``lora-jax train`` on them with the `config.yaml` beside
this file. Further settings and options of that command may follow.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.fetch import cache_dir, minilm
from experiments.vader import load_vader
from lora_jax.cli.main import main

CONFIG = Path(__file__).with_name("config.yaml")


def arguments(more: Sequence[str] = ()) -> list[str]:
    """Downloads the model and the data.

    Args:
      more: further settings and options.

    Returns:
      The arguments for ``lora-jax`` to train on them.
    """
    paths = {"model.path": minilm()}
    for name, rows in load_vader("vader/movie", seed=0)._asdict().items():
        file = cache_dir() / f"vader_movie_{name}.jsonl"
        write_whole(file, "".join(f"{json.dumps(row)}\n" for row in rows))
        paths[f"data.{name}"] = file
    settings = [f"{key}={path}" for key, path in paths.items()]
    return ["train", str(CONFIG), *settings, *more]


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.argv[1:] = arguments(sys.argv[1:])
    sys.exit(main())  # reads sys.argv, as `lora-jax` does
