"""Text to token ids by a model's own ``tokenizer.json``.

A thin wrapper over the ``tokenizers`` package. Such files often carry truncation and
padding settings of whoever saved them (all-MiniLM-L6-v2's pads every text to 128);
both are switched off here: truncation is asked for and counted, padding is batching's.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FILE = "tokenizer.json"


class Encoded(NamedTuple):
    """A batch of texts as token ids.

    Attributes:
      ids: one list of ids a text, special tokens included, of unequal lengths.
      truncated: how many of the texts were cut to ``max_length``.
    """

    ids: list[list[int]]
    truncated: int


class Tokenizer:
    """Encodes texts with a ``tokenizer.json``.

    Attributes:
      path: the file it was read from.
      vocab_size: number of ids, added tokens included.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "reading a tokenizer needs the package tokenizers: "
                'pip install "lora_jax[train]".'
            ) from error
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} must be a {FILE}; there is no file.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{self.path} must be a {FILE} of the tokenizers package; it can't be "
                f"read: {error}. Copy or download it again."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> Encoded:
        """Encodes a batch of texts, special tokens included.

        Args:
          texts: the texts.
          max_length: ids a text may have at most, special tokens counted; the closing
            special token survives the cut. None for no limit.

        Returns:
          The ids, and how many texts were cut.

        Raises:
          TypeError: if ``texts`` is one string or holds anything but strings.
          ValueError: if ``max_length`` leaves no room beside the special tokens.
        """
        if isinstance(texts, str):
            raise TypeError(
                f"texts must be a sequence of strings; got one string, {texts[:40]!r}. "
                "Put it in a list."
            )
        wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
        if wrong:
            raise TypeError(
                f"texts must hold strings; got {type(texts[wrong[0]]).__name__} at "
                f"index {wrong[0]} ({len(wrong)} of {len(texts)} are not strings)."
            )
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length is not None and max_length <= special:
            raise ValueError(
                f"max_length must be above {special}, the special tokens of each text; "
                f"got {max_length}."
            )
        encodings = self._tokenizer.encode_batch(list(texts))
        truncated = 0
        if max_length is not None:
            truncated = sum(len(e) > max_length for e in encodings)
        if max_length is not None and truncated:
            # Cut by the package, which knows which special tokens come after the text.
            self._tokenizer.enable_truncation(max_length)
            try:
                encodings = self._tokenizer.encode_batch(list(texts))
            finally:
                self._tokenizer.no_truncation()
        return Encoded([e.ids for e in encodings], truncated)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """Loads a model folder's tokenizer, or None where the folder has none."""
    path = Path(folder) / FILE
    return Tokenizer(path) if path.is_file() else None
