"""Chat templates: messages to one text, and which of its characters the model says.

Templates come with models, so they are strangers' programs: they run in jinja2's
immutable sandbox, with the names and filters that transformers gives them, in a process
of their own with limits of time and memory (`lora_jax.files.chat_worker`). There is no
clock: ``strftime_now`` always tells midnight of 26 July 2024, the date that Llama 3's
templates write where nobody gives one, so the same data is the same text on any day.
"""

import contextlib
import json
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.files import chat_worker
from lora_jax.files.chat_worker import CLOSE, OPEN
from lora_jax.files.encoding import MAX_TEXT
from lora_jax.files.optional import load_optional

ASSISTANT = "assistant"
SECONDS = 2.0  # of processor time, that one text may take
MORE_SECONDS = 0.01  # for each beginning of it that is written too
PATIENCE = 15.0  # seconds by the clock; a busy machine runs a process now and then
MEMORY = 256 << 20  # bytes

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """A conversation as one text.

    Attributes:
      text: what the template wrote.
      spans: ``(start, end)`` of what the assistant says, in characters.
      marked: whether the template itself says where the spans are.
    """

    text: str
    spans: list[tuple[int, int]]
    marked: bool


class ChatTemplate:
    """A chat template, in a process of its own.

    Args:
      source: Jinja source.
      tokens: texts of special tokens by the names templates use, such as
        ``{"bos_token": "<s>"}``.
      name: what to call it in an error.

    Raises:
      ImportError: if jinja2 is not installed.
      ValueError: if the source is no template, or takes too much to read.

    Example:
      >>> source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
      >>> source += "{% if add_generation_prompt %}assistant: {% endif %}"
      >>> template = ChatTemplate(source, {})
      >>> chat = [{"role": "user", "content": "1?"}]
      >>> chat += [{"role": "assistant", "content": "2"}]
      >>> template.render(chat[:1], add_generation_prompt=True)
      'user: 1?\\nassistant: '
      >>> template.mark_assistant(chat).spans
      [(20, 22)]
    """

    def __init__(
        self, source: str, tokens: Mapping[str, Any], name: str = "the chat template"
    ):
        load_optional("filling in a chat template", "jinja2")
        self.source, self.name = source, name
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._first = {
            "path": [entry for entry in sys.path if entry],
            "source": source,
            "tokens": dict(tokens),
            "memory": MEMORY,
            "letters": MAX_TEXT,  # in bytes, where it is encoded
            "seconds": SECONDS,
        }
        self._fault = ""  # a limit that was passed is not tried again
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        answer = self._ask(None)
        if "error" in answer:
            raise ValueError(
                f"{name} must be Jinja; it can't be read: {answer['error']}."
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Writes a conversation as one text.

        Args:
          messages: each with a ``role`` and a ``content``.
          add_generation_prompt: whether the text ends where an answer begins.
          tools: that the model may call, as JSON schemas.

        Returns:
          The text.

        Raises:
          ValueError: if the messages are malformed, the template refuses them, or it
            takes over 2 seconds or 256 MiB.
        """
        check_messages(messages)
        text = self._render(messages, tools, add_generation_prompt)["text"]
        return text.replace(OPEN, "").replace(CLOSE, "")

    def mark_assistant(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> Rendered:
        """Writes a conversation and finds what the assistant says in it.

        A template may say so itself, with ``{% generation %}``. Of any other, the text
        up to an assistant's turn (with the prompt to generate) and the text after it
        are rendered too; both must begin the whole text, and the turn is what lies
        between their ends.

        Args:
          messages: each with a ``role`` and a ``content``; one at least the
            assistant's.
          tools: that the model may call, as JSON schemas.

        Returns:
          The text and the spans.

        Raises:
          ValueError: if there is no such turn, the template refuses the messages or
            takes too much, or it writes earlier turns otherwise once later ones follow.
        """
        check_messages(messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT]
        if not turns:
            roles = [m["role"] for m in messages]
            raise ValueError(
                f"messages must hold a turn of the role {ASSISTANT!r}; got {roles[:8]}."
            )
        if self._marks:
            return _read_marks(self._render(messages, tools, False)["text"])
        beginnings = [end for i in turns for end in ((i, True), (i + 1, False))]
        found = self._render(messages, tools, False, beginnings)
        spans = list(zip(found["ends"][::2], found["ends"][1::2], strict=True))
        for turn, (before, after) in zip(turns, spans, strict=True):
            if before is None or after is None or before > after:
                raise ValueError(
                    f"{self.name} must write a conversation's beginning the same "
                    f"whatever follows; it does not before or after message {turn}, so "
                    "where the assistant's turn lies can't be told. Put {% generation "
                    "%} and {% endgeneration %} around it in the template, or give "
                    "prompt and completion."
                )
        return Rendered(found["text"], spans, marked=False)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        prompt: bool,
        beginnings: Sequence[tuple[int, bool]] = (),
    ) -> dict[str, Any]:
        """Returns the text, and the ends of its beginnings (None: it isn't one)."""
        request = {
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "prompt": prompt,
            "ends": beginnings,
            "seconds": SECONDS + MORE_SECONDS * len(beginnings),
        }
        answer = self._ask(request)
        if "error" in answer:
            raise ValueError(
                f"{self.name} can't write these {len(messages)} messages: "
                f"{answer['error']}"
            )
        return answer

    def _ask(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """Has the worker read the template and answer, once it is there."""
        with self._lock:
            if self._fault:
                raise ValueError(self._fault)
            try:
                if self._worker is None:
                    self._worker = _Worker()
                    answer = self._worker.ask(self._first)
                    if request is None or "error" in answer:
                        return answer
                return self._worker.ask(request or self._first)
            except _LimitError as limit:
                self._worker = None
                self._fault = (
                    f"{self.name} must write a text within {SECONDS:g} s and "
                    f"{MEMORY >> 20} MiB; it {limit}. It is faulty or hostile: take "
                    "the one of the model's first publisher."
                )
                raise ValueError(self._fault) from None
            except BaseException:  # an answer may be under way still
                self._worker = None
                raise


class _LimitError(Exception):
    """What a template asked too much of."""


class _Worker:
    """A process that fills in one template; it ends with this object."""

    def __init__(self):
        # Isolated, without site-packages' hooks: it is told where jinja2 is.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(Path(chat_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the command alone
        )
        self.end = weakref.finalize(self, _end, self._process)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request; an answer that doesn't come is a `_LimitError`."""
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages must be JSON values; {error}.") from error
        try:
            answer = json.loads(self._exchange(line))
        except (OSError, EOFError):
            self.end()
            code = self._process.returncode
            if code == -chat_worker.TIME_IS_OVER:
                raise _LimitError("takes longer") from None
            raise _LimitError(f"ended its process (status {code})") from None
        if "limit" in answer:
            raise _LimitError("needs more")
        return answer

    def _exchange(self, line: bytes) -> bytes:
        process, parts = self._process, []
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        left = memoryview(line)
        while left:
            left = left[process.stdin.write(left) :]
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(deadline - time.monotonic()):
                parts.append(process.stdout.read(1 << 16))
                if not parts[-1]:
                    raise EOFError
                if parts[-1].endswith(b"\n"):
                    return b"".join(parts)
        raise EOFError


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # pyright: ignore[reportOptionalMemberAccess]  # both are pipes
    process.wait()


def check_messages(messages: Any) -> None:
    """Raises unless messages are a list with roles and contents.

    Args:
      messages: objects with the strings ``role`` and ``content``; where there are
        ``tool_calls``, the content may be null or absent.

    Raises:
      ValueError: naming the first message that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            "messages must be a list of at least 1 message; got "
            f"{str(messages)[:40]!r}."
        )
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if key == "content" and value is None and _calls(message):
                continue
            if not isinstance(value, str):
                raise ValueError(
                    f"message {i} must be an object with the strings role and content; "
                    f"its {key} is {str(value)[:40]!r}."
                )
        content = message.get("content") or ""
        if OPEN in content or CLOSE in content:
            raise ValueError(
                f"message {i} must be text; it holds the noncharacter U+FDD0 or U+FDD1."
            )


def _calls(message: Any) -> bool:
    return isinstance(message, Mapping) and bool(message.get("tool_calls"))


def _read_marks(marked: str) -> Rendered:
    """Takes the marks out of a text and says where they were."""
    text, spans, start = "", [], 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            start = len(text)
        elif piece == CLOSE:
            spans.append((start, len(text)))
        else:
            text += piece
    return Rendered(text, [s for s in spans if s[0] < s[1]], marked=True)
