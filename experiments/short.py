"""Short runs: the last layers of MiniLM on a few short sentences, for many runs.

The sentiment experiment takes minutes per run. The experiments that compare learning
rates, ranks, methods and seeds need a hundred runs each, so they share this smaller
task: a few hundred of VADER's sentences of at most 24 tokens, and adapters on the last
two of MiniLM's six layers, over the cached outputs of the others (`experiments.trunk`).
`Runs` records every run, and `run_short` is the frame of their ``run.py``.
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import fetch, vader
from experiments.trunk import cache_trunk
from lora_jax import (
    Batches,
    adapt,
    classification_loss,
    evaluate,
    load_adapter,
    load_model,
    make_eval_step,
)

HEAD = "classifier"
ROWS = 50  # sentences per batch of an evaluation
ALPHA = 32.0

Params = dict[str, Any]


class Size(NamedTuple):
    """How much of the model and of each domain's sentences is used.

    Attributes:
      top: the last layers of MiniLM, which are trained over cached outputs of the
        others; None for the whole model.
      train: training sentences.
      validation: validation sentences.
      test: test sentences.
      tokens: the fewest and the most tokens of a sentence.
    """

    top: int | None = 2
    train: int = 512
    validation: int = 320
    test: int = 600
    tokens: tuple[int, int] = (9, 16)


QUICK = Size(1, 32, 16, 16, (3, 24))
SPLITS = ("train", "validation", "test")


class Task:
    """A model folder and JSONL files, made in the cache, and their evaluation.

    Attributes:
      size: the sizes.
      model: the model folder.
      loaded: the model, with a head that is not trained.
      files: paths by domain and split.
    """

    def __init__(self, size: Size, domains: Sequence[str] = ("movie",)):
        self.size = size
        whole = load_model(fetch.minilm())
        rows = {name: short_rows(name, size, whole.tokenizer) for name in domains}
        parts = [(name, split) for name in domains for split in SPLITS]
        self.model = whole.path
        if size.top is not None:
            texts = [row["text"] for d, s in parts for row in rows[d][s]]
            self.model, texts = cache_trunk(whole, texts, size.top)
            cached = iter(texts)
            for d, s in parts:
                rows[d][s] = [{**row, "text": next(cached)} for row in rows[d][s]]
        kind = "whole" if size.top is None else f"top-{size.top}"
        self.files: dict[str, dict[str, Path]] = {name: {} for name in domains}
        for d, s in parts:
            name = f"{'-'.join(domains)}-{kind}-{d}-{s}"
            self.files[d][s] = write_rows(name, rows[d][s])
        self.loaded = load_model(self.model, num_labels=2)
        self._step = make_eval_step(classification_loss(self.loaded.module))

    def _encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        return encode(self.loaded.tokenizer, rows)

    def batches(self, file: Path, size: int = ROWS, seed: int | None = None) -> Batches:
        """Tokenises a file.

        Args:
          file: a JSONL file.
          size: sentences per batch.
          seed: of the shuffling; None keeps the order.

        Returns:
          The batches, padded to multiples of 8.
        """
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        examples = [
            {"input_ids": ids, "label": row["label"]}
            for ids, row in zip(self._encode(rows), rows, strict=True)
        ]
        first, last = (-(-tokens // 8) * 8 for tokens in self.size.tokens)
        buckets = list(range(first, last + 1, 8))
        shuffle = seed is not None
        return Batches(examples, size, buckets, seed=seed or 0, shuffle=shuffle)

    def score(self, params: Params, batches: Batches) -> dict[str, float]:
        """Returns the loss and the accuracy of a whole model, adapters merged."""
        found = evaluate(self._step, {"params": params}, batches.epoch(0))
        return {name: found[name] for name in ("loss", "accuracy")}

    def config(self, domain: str = "movie", **sections: Any) -> dict[str, Any]:
        """Returns settings for `sweep` without ``output.dir``.

        Args:
          domain: whose files to train and validate on.
          **sections: changes, by section.

        Returns:
          A config: one epoch, batch 16, alpha 32, one validation after the last step.
        """
        files = self.files[domain]
        config: dict[str, dict[str, Any]] = {
            "model": {"path": str(self.model)},
            "data": {name: str(files[name]) for name in ("train", "validation")},
            "lora": {"rank": 8, "alpha": ALPHA},
            "train": {
                "batch_size": 16,
                "eval_every": 1_000_000,
                "keep": 1,
                "baseline": False,
            },
        }
        return {
            name: {**config.get(name, {}), **sections.get(name, {})}
            for name in {**config, **sections}
        }

    def merged(self, run: str | os.PathLike[str]) -> Params:
        """Returns the whole model of a run folder: W0 + s A B, and its head."""
        adapter = load_adapter(Path(run) / "adapter")
        return self.with_adapter(adapter.config, adapter.variables)

    def with_adapter(self, config: Any, variables: Mapping[str, Any]) -> Params:
        """Merges an adapter into the base.

        Args:
          config: its `LoRAConfig`.
          variables: ``lora``, and ``params`` with the head.

        Returns:
          The parameters.
        """
        adapted = adapt(self.loaded.module, config, *self.loaded.inputs)
        frozen = {k: v for k, v in self.loaded.params.items() if k != HEAD}
        return adapted.merge({"frozen": frozen, **variables}, check=False)


def encode(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Returns the rows' token ids."""
    return tokenizer.encode([row["text"] for row in rows]).ids


def short_rows(domain: str, size: Size, tokenizer: Any) -> dict[str, list[Any]]:
    """Returns a domain's splits: its short sentences, shuffled with seed 0.

    Args:
      domain: one of VADER's.
      size: the sizes.
      tokenizer: the model's.

    Returns:
      Rows by split.

    Raises:
      ValueError: if there are not enough sentences.
    """
    splits = vader.load_vader(f"vader/{domain}", seed=0)
    rows = [row for split in splits for row in split]
    least, most = size.tokens
    lengths = map(len, encode(tokenizer, rows))
    kept = [row for row, n in zip(rows, lengths, strict=True) if least <= n <= most]
    wanted = sum(getattr(size, split) for split in SPLITS)
    if len(kept) < wanted:
        raise ValueError(
            f"{domain} must have {wanted} sentences of {least} to {most} tokens; it "
            f"has {len(kept)}."
        )
    found, start = {}, 0
    for split in SPLITS:
        count = getattr(size, split)
        found[split] = kept[start : start + count]
        start += count
    return found


def write_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a JSONL file in the cache."""
    folder = fetch.cache_dir() / "short"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{len(rows)}.jsonl"
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def best(
    runs: Iterable[Mapping[str, Any]],
    by: str | Sequence[str],
    metric: str = "loss",
) -> tuple[Any, ...]:
    """Returns the setting with the lowest mean loss over its runs.

    Args:
      runs: the rows.
      by: the settings to choose.
      metric: to minimise; a run without it (it diverged) counts as infinite.

    Returns:
      The settings' values.
    """
    names = [by] if isinstance(by, str) else by
    found: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        value = run[metric]
        key = tuple(run[name] for name in names)
        found.setdefault(key, []).append(np.inf if value is None else value)
    return min(found, key=lambda key: statistics.mean(found[key]))


def mean_sd(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Formats a mean and a standard deviation.

    Example:
      >>> mean_sd([0.79, 0.8, 0.81], 100, 1)
      '80.0 ± 1.0'
    """
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
