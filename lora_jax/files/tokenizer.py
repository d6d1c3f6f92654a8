"""Text to token ids and back, by a model's own tokenizer.

A thin wrapper over the ``tokenizers`` package, for ``tokenizer.json`` and GGUF files.
A ``tokenizer.json`` often carries truncation and padding settings of whoever saved it
(all-MiniLM-L6-v2's pads every text to 128); both are switched off here: truncation is
explicit and counted, and padding is left to batching.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.files.atomic import new_file, write_text
from lora_jax.files.chat import ChatTemplate
from lora_jax.files.chat_tokens import ChatTokens, mark_tokens
from lora_jax.files.encoding import check_text, close_gaps, explained
from lora_jax.files.gguf import SUFFIX, GGUFReader
from lora_jax.files.gguf_tokenizer import build_tokenizer
from lora_jax.files.growth import text_growth
from lora_jax.files.json_file import read_text
from lora_jax.files.messages import Message
from lora_jax.files.optional import load_optional
from lora_jax.files.special_tokens import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    SpecialTokens,
    read_special_tokens,
)

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\ufffd"
MAX_FILE = 1 << 28  # bytes


class Encoded(NamedTuple):
    """A batch of texts as token ids.

    Attributes:
      ids: one list of ids a text, special tokens included, of unequal lengths.
      truncated: how many of the texts were cut to ``max_length``.
    """

    ids: list[list[int]]
    truncated: int


class TextTokens(NamedTuple):
    """One text as token ids, each with its characters.

    Attributes:
      ids: the tokens, after a beginning-of-text token where the model has one; none is
        appended.
      spans: ``(start, end)`` of each token in the text. Several tokens of one character
        all have its span; a beginning-of-text token has ``(0, 0)``.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """Encodes and decodes with a ``tokenizer.json``, or with a GGUF file's tokenizer.

    Attributes:
      path: the file it was read from.
      vocab_size: number of ids, added tokens included.
      special: special tokens and chat template, from the files beside a
        ``tokenizer.json`` or from the GGUF file.

    Args:
      path: a ``tokenizer.json`` or a ``.gguf`` file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it can't be read, or a GGUF file's tokenizer is of an unsupported
        kind.
    """

    def __init__(self, path: str | os.PathLike[str]):
        tokenizers = load_optional("reading a tokenizer", "tokenizers")
        self.path = Path(path)
        self.special: SpecialTokens
        if self.path.suffix == SUFFIX:
            metadata = GGUFReader(self.path).metadata
            self._tokenizer, self.special = build_tokenizer(self.path, metadata)
        else:
            self._tokenizer = _read_json(self.path, tokenizers)
            find = self._tokenizer.token_to_id
            self.special = read_special_tokens(self.path.parent, find)
        with explained(self.path, "a tokenizer"):
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._growth = text_growth(self._tokenizer)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self._chat: ChatTemplate | None = None

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
          ValueError: if ``max_length`` leaves no room beside the special tokens, or a
            text is no Unicode or over 1 MiB.
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
        for i, text in enumerate(texts):
            check_text(text, f"text {i}", self._growth)
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length is not None and max_length <= special:
            raise ValueError(
                f"max_length must be above {special}, the special tokens of each text; "
                f"got {max_length}."
            )
        with explained(self.path, "a tokenizer"):
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

    def encode_text(self, text: str) -> TextTokens:
        """Encodes one text for a language model, with each token's place in it.

        A beginning-of-text token (BOS) comes once, even if the text itself begins with
        it, as a rendered chat template does. End-of-text tokens are left out.

        Args:
          text: the text.

        Returns:
          The ids and their places.

        Raises:
          ValueError: if the text is not Unicode or over 1 MiB, or the tokenizer fails.
        """
        encoding = self._encode(text)
        own = [i for i, m in enumerate(encoding.special_tokens_mask) if not m]
        start, stop = (own[0], own[-1] + 1) if own else (len(encoding.ids), 0)
        begin = encoding.ids[:start] if own else self._begin()
        ids = encoding.ids[start:stop]
        if ids[: len(begin)] == begin:
            begin = []
        spans = close_gaps(text, encoding.offsets[start:stop])
        return TextTokens(begin + ids, [(0, 0)] * len(begin) + spans)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Writes a conversation as one text, by the model's chat template.

        Args:
          messages: each with a ``role`` and a ``content``.
          add_generation_prompt: whether the text ends where an answer begins.
          tools: that the model may call, as JSON schemas.

        Returns:
          The text.

        Raises:
          ValueError: if there is no template, or it refuses the messages.
        """
        template = self._template()
        return template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[ChatTokens]:
        """Encodes a conversation, and marks what the assistant says.

        See `mark_tokens` for which tokens are those of a turn.

        Args:
          messages: each with a ``role`` and a ``content``; at least one is the
            assistant's.
          tools: that the model may call, as JSON schemas.

        Returns:
          Ids and mask of each text that the conversation takes; one, unless the
          template writes earlier turns otherwise once later ones follow.

        Raises:
          ValueError: if there is no template, it refuses the messages, or the
            assistant's turns can't be located; see `ChatTemplate.mark_assistant`.
        """
        found = []
        for rendered in self._template().mark_assistant(messages, tools=tools):
            encoding = self._encode(rendered.text, add_special_tokens=False)
            spans = close_gaps(rendered.text, encoding.offsets)
            stops = self.special.stop_ids
            found.append(mark_tokens(rendered, encoding.ids, spans, stops))
        return found

    def encode_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Encodes a conversation up to where the assistant answers.

        The tokens are those that `encode_chat` has before the answer: what the template
        writes, and no BOS besides.

        Args:
          messages: each with a ``role`` and a ``content``.
          tools: that the model may call, as JSON schemas.

        Returns:
          The ids.

        Raises:
          ValueError: if there is no template, or it refuses the messages.
        """
        text = self.render_chat(messages, tools=tools)
        return self._encode(text, add_special_tokens=False).ids

    @property
    def special_ids(self) -> dict[str, int]:
        """The tokens that `decode` leaves out, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids, by default without special tokens."""
        with explained(self.path, "a tokenizer"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer into a model folder, as transformers reads it.

        Args:
          directory: gets ``tokenizer.json``, ``tokenizer_config.json`` (special tokens,
            chat template) and ``generation_config.json`` (where generation stops).
        """
        directory = Path(directory)
        with new_file(directory / TOKENIZER_FILE) as new:
            self._tokenizer.save(str(new))
        special = self.special
        named = {"bos": special.bos_id, "eos": special.eos_id, "pad": special.pad_id}
        settings: dict[str, Any] = dict(special.texts) | {
            f"{name}_token": self._tokenizer.id_to_token(token)
            for name, token in named.items()
            if token is not None
        }
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if special.chat_template is not None:
            settings["chat_template"] = special.chat_template
        stops = {"eos_token_id": list(special.stop_ids)}
        for file, values in (
            (TOKENIZER_CONFIG, settings),
            (GENERATION_CONFIG, stops),
        ):
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            write_text(directory / file, text)

    def stream(self) -> "TextStream":
        """Returns a decoder for ids that come one by one."""
        return TextStream(self._tokenizer, self.path)

    def _encode(self, text: str, **options: Any) -> Any:
        check_text(text, "a text", self._growth)
        with explained(self.path, "a tokenizer"):
            return self._tokenizer.encode(text, **options)

    def _begin(self) -> list[int]:
        """Returns the tokens before every text (an empty one doesn't show which)."""
        encoding = self._encode("x")
        mask = encoding.special_tokens_mask
        return encoding.ids[: mask.index(0) if 0 in mask else None]

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            if self.special.chat_template is None:
                raise ValueError(
                    f"{self.path} must come with a chat template to write messages; it "
                    "has none. Put a chat_template.jinja beside it, or give text or "
                    "prompt and completion."
                )
            named = {"bos": self.special.bos_id, "eos": self.special.eos_id}
            named["pad"] = self.special.pad_id
            tokens: Mapping[str, Any] = {
                f"{name}_token": self._tokenizer.id_to_token(token)
                for name, token in named.items()
                if token is not None
            }
            self._chat = ChatTemplate(
                self.special.chat_template,
                {**self.special.texts, **tokens},
                f"the chat template of {self.special.template_file or self.path}",
            )
        return self._chat


class TextStream:
    """Decodes ids one by one, never yielding part of a character.

    Bytes that are not UTF-8 are left out, where `Tokenizer.decode` has replacement
    characters.
    """

    def __init__(self, tokenizer: Any, path: Path):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._path = tokenizer, path
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Takes the next id.

        Args:
          token: the id.

        Returns:
          The text that this id completes; it may be empty.
        """
        with explained(self._path, "a tokenizer"):
            text = self._stream.step(self._tokenizer, token)
        return (text or "").replace(REPLACEMENT, "")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Loads a model's tokenizer, or None where it has none.

    Args:
      path: a model folder, or a GGUF file.

    Returns:
      The tokenizer.

    Raises:
      ValueError: if it can't be read.
    """
    path = Path(path)
    if path.suffix == SUFFIX and path.is_file():
        return Tokenizer(path)
    return (
        Tokenizer(path / TOKENIZER_FILE) if (path / TOKENIZER_FILE).is_file() else None
    )


def _read_json(path: Path, tokenizers: Any) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a {TOKENIZER_FILE}; there is no file.")
    text = read_text(path, MAX_FILE)
    with explained(path, f"a {TOKENIZER_FILE} of the tokenizers package"):
        return tokenizers.Tokenizer.from_str(text)
