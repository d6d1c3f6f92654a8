"""The main job: says whether a sentence from a film review is positive or negative.

    python -m experiments.sentiment.train
    python -m experiments.sentiment.train lora.rank=4 output.dir=runs/rank-4

Fetches all-MiniLM-L6-v2 and VADER's sentences into the cache, writes the three splits
there as JSONL files, and hands both to ``lora-jax train`` with the `config.yaml` beside
this file. Settings and options of that command may follow.
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
    """Fetches the model and the data.

    Args:
      more: settings and options that follow.

    Returns:
      The command line of ``lora-jax`` that trains on them.
    """
    paths = {"model.path": minilm()}
    for name, rows in load_vader("vader/movie", seed=0)._asdict().items():
        file = cache_dir() / f"vader_movie_{name}.jsonl"
        write_whole(file, "".join(f"{json.dumps(row)}\n" for row in rows))
        paths[f"data.{name}"] = file
    settings = [f"{key}={path}" for key, path in paths.items()]
    return ["train", str(CONFIG), *settings, *more]


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.argv[1:] = arguments(sys.argv[1:])
    sys.exit(main())  # reads sys.argv, as `lora-jax` does
