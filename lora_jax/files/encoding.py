"""Helpers for the `tokenizers` package: limits, errors, and gaps in its offsets."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_TEXT = 1 << 20  # bytes of UTF-8; each may become a token, which takes 500 bytes
MAX_GROWN = 2 * MAX_TEXT  # characters that a tokenizer may make of it


def check_text(text: str, what: str, growth: float = 1.0) -> None:
    """Raises a `ValueError` for lone surrogates or a text that is too long.

    Args:
      text: at most 1 MiB.
      what: its name in errors.
      growth: characters that a tokenizer may make of each byte; 2 MiB in all.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be Unicode; it contains a lone surrogate, "
            f"{text[error.start]!a}, at {error.start}."
        ) from error
    if size > MAX_TEXT:
        raise ValueError(
            f"{what} must have at most {MAX_TEXT:,} bytes; it has {size:,}. Split it."
        )
    if size * growth > MAX_GROWN:
        raise ValueError(
            f"{what} must have at most {int(MAX_GROWN / growth):,} bytes for this "
            f"tokenizer, which may write {growth:.3g} characters for each; it has "
            f"{size:,}. Split it."
        )


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Turns any error of the package into a `ValueError`: ``path`` must be ``what``.

    The package raises bare `Exception`, and a `BaseException` when it panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(
            f"{path} must be {what}; tokenizers can't use it: {str(error)[:500]}. "
            "Copy or download it again."
        ) from error


def close_gaps(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extends token spans so that they cover every character of a text.

    Some tokenizers' offsets omit characters: white space before a word (assigned to the
    word's token here), or an accent composed with its letter (to the letter's).

    Args:
      text: the text.
      offsets: the ``(start, end)`` of each token.

    Returns:
      The spans.

    Example:
      >>> close_gaps("a bc", [(0, 1), (2, 4)])
      [(0, 1), (1, 4)]
    """
    spans: list[tuple[int, int]] = []
    for start, end in offsets:
        last = spans[-1][1] if spans else 0
        if text[last:start].strip():
            last = _extend(spans, start)
        spans.append((min(start, last), end))
    _extend(spans, len(text))
    return spans


def _extend(spans: list[tuple[int, int]], end: int) -> int:
    """Extends the last token, and others of the same character, to ``end``."""
    owner = spans[-1] if spans else None
    for i in range(len(spans) - 1, -1, -1):
        if spans[i] != owner:
            break
        spans[i] = (spans[i][0], max(spans[i][1], end))
    return end if spans else 0
