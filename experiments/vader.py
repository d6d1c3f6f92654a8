"""VADER's ground truth: sentences from four domains with human sentiment ratings.

Each sentence has the mean of twenty ratings from -4 to 4. The label is 1 if it is above
zero, otherwise 0 (including the few exact zeros, which gives 5,242 and 5,363 movie
sentences). The files are in the source archive of the package vaderSentiment (MIT, but
with third-party texts), so they are downloaded and not part of this repository. They
are sorted (movies by label) and must be shuffled.

References:
  Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
  Social Media Text, ICWSM 2014.
"""

import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.fetch import fetch_package

PACKAGE = "vaderSentiment==3.3.2"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"


class Domain(NamedTuple):
    """One of the four files, and its split.

    Attributes:
      file: prefix of the file name.
      train: number of training sentences.
      validation: number of validation sentences; the rest are for testing.
    """

    file: str
    train: int
    validation: int


# The movie split is that of the sentiment experiment; others are about 75 and 10 %.
DOMAINS = {
    "vader/movie": Domain("movieReviewSnippets", 8000, 1000),
    "vader/amazon": Domain("amazonReviewSnippets", 2800, 350),
    "vader/nyt": Domain("nytEditorialSnippets", 3900, 500),
    "vader/tweets": Domain("tweets", 3150, 400),
}

Example = dict[str, Any]


class Splits(NamedTuple):
    """The three splits of a dataset: lists of ``{"text": str, "label": 0 or 1}``."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_vader(
    name: str = "vader/movie", *, seed: int, drop_zeros: bool = False
) -> Splits:
    """Loads, shuffles and splits one domain.

    Args:
      name: one of `DOMAINS`.
      seed: seed of the shuffle; the splits are the same on every platform.
      drop_zeros: drop sentences rated exactly zero, instead of labelling them 0, which
        shortens the test split (by 37 for movies).

    Returns:
      The three splits.

    Raises:
      ValueError: if the name is unknown or a line can't be read.
      FetchError: if the package can't be downloaded.
    """
    if name not in DOMAINS:
        raise ValueError(
            f"data set must be one of {sorted(DOMAINS)}; got {name!r}. A file of your "
            'own is a JSONL file of {"text", "label"} lines.'
        )
    domain = DOMAINS[name]
    archive = fetch_package(PACKAGE) / INNER
    rows = parse_ratings(_member(archive, MEMBER.format(domain.file)), name)
    examples = [
        {"text": text, "label": int(rating > 0)}
        for rating, text in rows
        if rating or not drop_zeros
    ]
    order = np.random.default_rng(seed).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    end = domain.train + domain.validation
    return Splits(
        shuffled[: domain.train], shuffled[domain.train : end], shuffled[end:]
    )


def load_editorials() -> list[str]:
    """Loads the New York Times domain as whole editorials.

    Returns:
      The texts in file order, with sentences joined by spaces.

    Raises:
      ValueError: if the file can't be read.
      FetchError: if the package can't be downloaded.
    """
    archive = fetch_package(PACKAGE) / INNER
    content = _member(archive, MEMBER.format(DOMAINS["vader/nyt"].file))
    texts: dict[str, list[str]] = {}
    lines = [line for line in content.decode("utf-8").split("\n") if line.strip()]
    rows = parse_ratings(content, "vader/nyt")
    for line, (_, text) in zip(lines, rows, strict=True):
        texts.setdefault(line.partition("_")[0], []).append(text)  # ids: editorial_line
    return [" ".join(sentences) for sentences in texts.values()]


def parse_ratings(content: bytes, name: str) -> list[tuple[float, str]]:
    """Parses lines of id, mean rating and text, separated by tabs.

    Args:
      content: the file's bytes, UTF-8.
      name: name of the file in errors.

    Returns:
      The rating and text of each line.

    Raises:
      ValueError: listing the lines without three fields, a rating in [-4, 4] or a text.

    Example:
      >>> parse_ratings(b"1\\t2.25\\tA delight.\\r\\n", "movie")
      [(2.25, 'A delight.')]
    """
    rows, faults = [], []
    # Not splitlines, which also splits at characters that occur inside texts.
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        try:
            _, rating, text = fields[0], float(fields[1]), fields[2].strip()
        except (IndexError, ValueError):
            rating, text = float("nan"), ""
        if len(fields) != 3 or not text or not -4 <= rating <= 4:
            faults.append(f"line {number}: {line[:60]!r}")
        rows.append((rating, text))
    if faults:
        raise ValueError(
            f"{name}: lines must be id, rating in [-4, 4] and text, separated by tabs; "
            f"{len(faults)} of {len(rows)} are not: " + "; ".join(faults) + "."
        )
    return rows


def _member(archive: Path, name: str) -> bytes:
    """Reads one file of a ``.tar.gz`` without unpacking it."""
    try:
        with tarfile.open(archive) as pack:
            file = pack.extractfile(name)
            if file is not None:
                return file.read()
    except (OSError, KeyError, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{archive} must be a .tar.gz that contains {name}; it can't be read: "
            f"{error}. Delete its folder in the cache to fetch it again."
        ) from error
    raise ValueError(f"{archive}: {name} must be a file; it is not.")
