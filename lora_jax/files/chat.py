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
from lora_jax.files.chat_worker import CLOSE, OPEN, REFUSED
from lora_jax.files.encoding import MAX_TEXT
from lora_jax.files.messages import (
    ASSISTANT,
    WEIGHT,
    Message,
    check_calls,
    check_messages,
    check_tools,
    counted_turns,
)
from lora_jax.files.optional import load_optional

PROBE = "\ufdd2"  # a character that no message has any use for
SECONDS = 2.0  # of processor time, that one text may take
MORE_SECONDS = 0.01  # for each beginning of it that is written too
PATIENCE = 15.0  # seconds by the clock; a busy machine runs a process now and then
MEMORY = 256 << 20  # bytes


class Rendered(NamedTuple):
    """A conversation as one text.

    Attributes:
      text: what the template wrote.
      turns: of each turn found in it, ``(start, end)`` of what the assistant says, in
        characters; a template's own marks may be several.
      marked: whether the template itself says where the turns are.
    """

    text: str
    turns: list[list[tuple[int, int]]]
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
      >>> template.mark_assistant(chat)[0].turns
      [[(20, 22)]]
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
        self._words = frozenset(answer["words"])

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
        self._check(messages, tools)
        text = self._render(messages, tools, add_generation_prompt)["text"]
        return text.replace(OPEN, "").replace(CLOSE, "")

    def mark_assistant(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[Rendered]:
        """Writes a conversation and finds what the assistant says in it.

        A turn is sought in the text in which the model would write it: that of the
        messages up to it. The text of the whole conversation serves where it begins
        with that one. Where it doesn't (Qwen3's template drops the thoughts of earlier
        turns), the turn gets a text of its own, which ends with it.

        A template may mark the turns itself, with ``{% generation %}``. In the text of
        any other, a turn lies between the end of the text up to it (with the prompt to
        generate) and the end of the text after it. A beginning that the template won't
        write, of no messages say, ends where the text begins to depend on the turn.

        Args:
          messages: each with a ``role`` and a ``content``; one at least the
            assistant's. Those with a ``weight`` of 0 don't count.
          tools: that the model may call, as JSON schemas.

        Returns:
          The texts, in which every turn that counts is found once.

        Raises:
          ValueError: if there is no such turn, the template refuses the messages or
            takes too much, or it writes a turn's beginning otherwise once it ends.
        """
        self._check(messages, tools)
        turns, stop = counted_turns(messages), len(messages)
        find = self._find_marks if self._marks else self._find
        texts: list[Rendered] = []
        while turns:
            rendered, found = find(messages[:stop], turns, tools)
            if found:
                texts.append(rendered)
            elif stop == turns[-1] + 1:
                raise ValueError(
                    f"{self.name} must write a conversation's beginning the same "
                    f"whatever follows; it does not before message {turns[-1]}, so "
                    "where the assistant's turn lies can't be told. Put {% generation "
                    "%} and {% endgeneration %} around it in the template, or give "
                    "prompt and completion."
                )
            turns = [turn for turn in turns if turn not in found]
            stop = turns[-1] + 1 if turns else 0
        return texts[::-1]

    def _check(self, messages: Any, tools: Any) -> None:
        check_messages(messages, self._words)
        check_tools(tools, self._words)

    def _find(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        tools: Sequence[Any] | None,
    ) -> tuple[Rendered, set[int]]:
        """Writes messages as one text; returns it and which of the turns are in it."""
        beginnings = [end for i in turns for end in ((i, True), (i + 1, False))]
        answer = self._render(messages, tools, False, beginnings)
        text, ends, found = answer["text"], answer["ends"], {}
        for i, start, end in zip(turns, ends[::2], ends[1::2], strict=True):
            if start == REFUSED or (start is None and i == 0):
                other = [*messages]
                other[i] = {**messages[i], "content": PROBE}
                start = _same(text, self._render(other, tools, False)["text"])
            if end is not None and start is not None and start <= end:
                found[i] = [(start, end)]
        return Rendered(text, [*found.values()], marked=False), {*found}

    def _find_marks(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        tools: Sequence[Any] | None,
    ) -> tuple[Rendered, set[int]]:
        """As `_find`, by the template's own marks."""
        whole = self._render(messages, tools, False)["text"]
        text, marks = _read_marks(whole)
        found = {}
        for i in turns:
            after = self._render(messages[: i + 1], tools, False)["text"]
            own = _read_marks(after)[1]
            first = 0
            if any(m["role"] == ASSISTANT for m in messages[:i]):
                before = self._render(messages[:i], tools, False)["text"]
                first = len(_read_marks(before)[1])
            if not own[first:] or own[-1][0] < _same(whole, after):
                found[i] = [span for _, span in marks[first : len(own)]]
        return Rendered(text, [*found.values()], marked=True), {*found}

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        prompt: bool,
        beginnings: Sequence[tuple[int, bool]] = (),
    ) -> dict[str, Any]:
        """Returns the text, and the ends of its beginnings (None: it isn't one)."""
        request = {
            "messages": [
                {key: value for key, value in message.items() if key != WEIGHT}
                for message in messages
            ],
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
        check_calls(messages, answer["text"])
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


def _same(one: str, other: str) -> int:
    """Returns how many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _read_marks(marked: str) -> tuple[str, list[tuple[int, tuple[int, int]]]]:
    """Takes the marks out of a text: returns it, and the places and spans of them."""
    text, marks, start, place = "", [], 0, 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            start = len(text)
        elif piece == CLOSE and start < len(text):
            marks.append((place, (start, len(text))))
        elif piece != CLOSE:
            text += piece
        place += len(piece)
    return text, marks
