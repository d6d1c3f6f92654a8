"""Tokenizing text with a model's own tokenizer.

A thin wrapper around the ``tokenizers`` package, for ``tokenizer.json`` and GGUF files.
Truncation and padding settings in a ``tokenizer.json`` (all-MiniLM-L6-v2's pads every
text to 128) are disabled: truncation is explicit and counted, and batching pads.
"""

import json
import os
from collections.abc import Sequence
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
      ids: a list of ids per text, including special tokens, of different lengths.
      truncated: number of texts truncated to ``max_length``.
    """

    ids: list[list[int]]
    truncated: int


class TextTokens(NamedTuple):
    """A text as token ids with their positions.

    Attributes:
      ids: the tokens, after a beginning-of-text token if the model has one; none is
        appended.
      spans: the ``(start, end)`` of each token in the text. If a character has several
        tokens, all have its span; a beginning-of-text token has ``(0, 0)``.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """The tokenizer of a ``tokenizer.json`` or a GGUF file.

    Attributes:
      path: the file it was read from.
      vocab_size: number of ids, including added tokens.
      special: special tokens and chat template, from the folder of the
        ``tokenizer.json`` or from the GGUF file.

    Args:
      path: a ``tokenizer.json`` or a ``.gguf`` file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it can't be read, or a GGUF file's tokenizer is not supported.
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
        """Encodes a batch of texts, adding special tokens.

        Args:
          texts: the texts.
          max_length: maximum number of ids per text, including special tokens; a
            closing special token is kept on truncation. None for no limit.

        Returns:
          The ids, and the number of truncated texts.

        Raises:
          TypeError: if ``texts`` is a single string or contains anything but strings.
          ValueError: if ``max_length`` leaves no room for text, or a text is not
            Unicode or over 1 MiB.
        """
        if isinstance(texts, str):
            raise TypeError(
                f"texts must be a sequence of strings; got one string, {texts[:40]!r}. "
                "Put it in a list."
            )
        if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise TypeError(
                f"texts must be strings; got {type(texts[wrong[0]]).__name__} at "
                f"index {wrong[0]} ({len(wrong)} of {len(texts)} are not strings)."
            )
        for i, text in enumerate(texts):
            check_text(text, f"text {i}", self._growth)
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length is not None and max_length <= special:
            raise ValueError(
                f"max_length must be above {special}, the number of special tokens per "
                f"text of {self.path}; got {max_length}."
            )
        with explained(self.path, "a tokenizer"):
            encodings = self._tokenizer.encode_batch(list(texts))
        if max_length is None:
            return Encoded([e.ids for e in encodings], 0)
        if truncated := sum(len(e) > max_length for e in encodings):
            # By the package, which knows the special tokens after the text.
            self._tokenizer.enable_truncation(max_length)
            try:
                encodings = self._tokenizer.encode_batch(list(texts))
            finally:
                self._tokenizer.no_truncation()
        return Encoded([e.ids for e in encodings], truncated)

    def encode_text(self, text: str) -> TextTokens:
        """Encodes a text for a language model, with the position of each token.

        A beginning-of-text token (BOS) is added unless the text itself starts with it,
        as rendered chat templates do. End-of-text tokens are omitted.

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
        """Renders a conversation with the model's chat template.

        Args:
          messages: each with a ``role`` and a ``content``.
          add_generation_prompt: whether to end with the start of an answer.
          tools: JSON schemas of the tools that the model may call.

        Returns:
          The text.

        Raises:
          ValueError: if there is no template, or it rejects the messages.
        """
        return self._template().render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[ChatTokens]:
        """Encodes a conversation and marks the assistant's tokens; see `mark_tokens`.

        Args:
          messages: each with a ``role`` and a ``content``; at least one by the
            assistant.
          tools: JSON schemas of the tools that the model may call.

        Returns:
          Ids and mask of each text of the conversation: one, unless the template
          renders earlier turns differently once later ones follow.

        Raises:
          ValueError: if there is no template, it rejects the messages, or the
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
        """Encodes a conversation up to the assistant's answer.

        The tokens are those before the answer in `encode_chat`: no BOS is added to what
        the template renders.

        Args:
          messages: each with a ``role`` and a ``content``.
          tools: JSON schemas of the tools that the model may call.

        Returns:
          The ids.

        Raises:
          ValueError: if there is no template, or it rejects the messages.
        """
        text = self.render_chat(messages, tools=tools)
        return self._encode(text, add_special_tokens=False).ids

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the tokens that `decode` omits, by text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @property
    def added_tokens(self) -> list[str]:
        """The texts of the added tokens, special ones included."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token in added.values()]

    def add_tokens(self, tokens: Sequence[str]) -> None:
        """Adds tokens, found in a text exactly as they are; they are not special."""
        make = load_optional("adding tokens", "tokenizers").AddedToken
        self._tokenizer.add_tokens([make(token, normalized=False) for token in tokens])
        self.vocab_size = self._tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, exactly as the vocabulary has it, or None."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids, by default without special tokens."""
        with explained(self.path, "a tokenizer"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer to a model folder, for transformers.

        The files are ``tokenizer.json``, ``tokenizer_config.json`` (special tokens,
        chat template) and ``generation_config.json`` (stop tokens).
        """
        directory = Path(directory)
        self.save_vocabulary(directory)
        settings = self._special_texts()
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.special.chat_template is not None:
            settings["chat_template"] = self.special.chat_template
        stops = {"eos_token_id": list(self.special.stop_ids)}
        for file, values in ((TOKENIZER_CONFIG, settings), (GENERATION_CONFIG, stops)):
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            write_text(directory / file, text)

    def save_vocabulary(self, directory: Path) -> None:
        """Writes the ``tokenizer.json`` alone."""
        with new_file(directory / TOKENIZER_FILE) as new:
            self._tokenizer.save(str(new))

    def stream(self) -> "TextStream":
        """Returns a decoder for ids that arrive one by one."""
        return TextStream(self._tokenizer, self.path)

    def _encode(self, text: str, **options: Any) -> Any:
        check_text(text, "a text", self._growth)
        with explained(self.path, "a tokenizer"):
            return self._tokenizer.encode(text, **options)

    def _begin(self) -> list[int]:
        """Returns the special tokens before every text (unclear from an empty one)."""
        encoding = self._encode("x")
        mask = encoding.special_tokens_mask
        return encoding.ids[: mask.index(0) if 0 in mask else None]

    def _special_texts(self) -> dict[str, Any]:
        """Returns the texts of special tokens by template variable."""
        special = self.special
        named = {"bos": special.bos_id, "eos": special.eos_id, "pad": special.pad_id}
        return dict(special.texts) | {
            f"{name}_token": self._tokenizer.id_to_token(token)
            for name, token in named.items()
            if token is not None
        }

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            if self.special.chat_template is None:
                raise ValueError(
                    f"{self.path} must come with a chat template to render messages; "
                    "it has none. Put a chat_template.jinja beside it, or use text or "
                    "prompt and completion."
                )
            self._chat = ChatTemplate(
                self.special.chat_template,
                self._special_texts(),
                f"the chat template of {self.special.template_file or self.path}",
            )
        return self._chat


class TextStream:
    """Decodes ids one by one, never yielding part of a character.

    Invalid UTF-8 is dropped, whereas `Tokenizer.decode` returns replacement characters.
    """

    def __init__(self, tokenizer: Any, path: Path):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._path = tokenizer, path
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Adds the next id; returns the text that it completes, possibly empty."""
        with explained(self._path, "a tokenizer"):
            text = self._stream.step(self._tokenizer, token)
        return (text or "").replace(REPLACEMENT, "")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Loads the tokenizer of a model folder or GGUF file; None if it has none.

    Raises:
      ValueError: if it can't be read.
    """
    path = Path(path)
    is_gguf = path.suffix == SUFFIX and path.is_file()
    file = path if is_gguf else path / TOKENIZER_FILE
    return Tokenizer(file) if file.is_file() else None


def _read_json(path: Path, tokenizers: Any) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a {TOKENIZER_FILE}; there is no file.")
    text = read_text(path, MAX_FILE)
    with explained(path, f"a {TOKENIZER_FILE} of the tokenizers package"):
        return tokenizers.Tokenizer.from_str(text)
