"""Chat templates: rendering messages to text, and finding the assistant's turns in it.

Templates come with models, so they are untrusted programs: they run in jinja2's
immutable sandbox, with the globals and filters that transformers provides, in a
separate process with time and memory limits (`lora_jax.files.chat_worker`).
``strftime_now`` always returns 26 July 2024, the default date of Llama 3's templates,
so that the same data is rendered to the same text on any day.
"""

import contextlib
import json
import os
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
    CALLS,
    PROBE,
    WEIGHT,
    Message,
    check_messages,
    check_parts,
    check_tools,
    continue_prompt,
    counted_turns,
    read_calls,
    text_of,
)
from lora_jax.files.optional import load_optional

SECONDS = 2.0  # CPU time per text
MORE_SECONDS = 0.01  # for each prefix rendered along with it
PATIENCE = 15.0  # wall-clock seconds, longer because the machine may be busy
MEMORY = 256 << 20  # bytes


class Rendered(NamedTuple):
    """A conversation as one text.

    Attributes:
      text: the template's output.
      turns: for each turn found, the ``(start, end)`` character spans of the
        assistant's words; several only if the template marks them itself.
      marked: whether the template marks the turns itself.
    """

    text: str
    turns: list[list[tuple[int, int]]]
    marked: bool


class ChatTemplate:
    """A chat template, run in a separate process.

    Args:
      source: Jinja source.
      tokens: texts of special tokens by template variable, such as
        ``{"bos_token": "<s>"}``.
      name: its name in error messages.

    Raises:
      ImportError: if jinja2 is not installed.
      ValueError: if the source is not a template, or exceeds the limits when compiled.

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
            "max_chars": MAX_TEXT,  # in bytes, where it is encoded
            "seconds": SECONDS,
        }
        self._fault = ""  # a template that exceeded a limit is not run again
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        answer = self._ask(None)
        if "error" in answer:
            raise ValueError(
                f"{name} must be Jinja; it can't be parsed: {answer['error']}."
            )
        self._words = frozenset(answer["words"])

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Renders a conversation.

        Args:
          messages: each with a ``role`` and a ``content``.
          add_generation_prompt: whether to end with the start of an answer.
          tools: JSON schemas of the tools that the model may call.

        Returns:
          The text.

        Raises:
          ValueError: if the messages are malformed, the template rejects them, or it
            takes over 2 seconds or 256 MiB.
        """
        self._check(messages, tools)
        text = self._render(messages, tools, add_generation_prompt)["text"]
        return text.replace(OPEN, "").replace(CLOSE, "")

    def mark_assistant(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[Rendered]:
        """Renders a conversation and finds the assistant's turns in it.

        Each turn is taken from a text that the model could generate it in: the rendered
        messages up to it. If the whole conversation's text starts with that text, it is
        used; if not (Qwen3's template drops the reasoning of earlier turns), the turn
        gets its own text, which ends with it.

        A template may mark the turns itself, with ``{% generation %}``. Otherwise a
        turn lies between the end of the text before it (with the generation prompt) and
        the end of the text up to it. If the template rejects the messages before it
        (an empty list, say), it begins where the text starts to depend on the turn.

        Args:
          messages: each with a ``role`` and a ``content``, at least one by the
            assistant. Turns with a ``weight`` of 0 are ignored.
          tools: JSON schemas of the tools that the model may call.

        Returns:
          The texts; together they contain each counted turn once.

        Raises:
          ValueError: if there is no such turn, the template rejects the messages or
            exceeds its limits, or it renders the text before a turn differently once
            the turn follows.
        """
        self._check(messages, tools)
        turns, stop = counted_turns(messages), len(messages)
        find = self._find_marks if self._marks else self._find
        texts: list[Rendered] = []
        while turns:
            rendered, found = find(messages[:stop], turns, tools)
            if not found and stop == turns[-1] + 1:
                rendered = self._continue(messages[:stop], tools)
                found = set(turns[-1:])
            if rendered is not None and found:
                texts.append(rendered)
            elif rendered is None:
                raise ValueError(
                    f"{self.name} must render the beginning of a conversation the same "
                    f"whatever follows; it does not before message {turns[-1]}, so the "
                    "assistant's turn can't be located. Put {% generation %} and "
                    "{% endgeneration %} around it in the template, or use prompt and "
                    "completion."
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
        """Renders messages; returns the text and the turns found in it."""
        beginnings = [end for i in turns for end in ((i, True), (i + 1, False))]
        answer = self._render(messages, tools, False, beginnings)
        text, ends, found = answer["text"], answer["ends"], {}
        for i, start, end in zip(turns, ends[::2], ends[1::2], strict=True):
            if start == REFUSED or (start is None and i == 0):
                other = self._render(_probed(messages, i), tools, False)
                start = _common(text, other["text"])
            if end is not None and start is not None and start <= end:
                found[i] = [(start, end)]
        return Rendered(text, [*found.values()], marked=False), {*found}

    def _find_marks(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        tools: Sequence[Any] | None,
    ) -> tuple[Rendered, set[int]]:
        """Like `_find`, using the template's own marks."""
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
            if not own[first:] or own[-1][0] < _common(whole, after):
                found[i] = [span for _, span in marks[first : len(own)]]
        return Rendered(text, [*found.values()], marked=True), {*found}

    def _continue(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> Rendered | None:
        """Renders the last turn as generated, if the template drops its thoughts."""
        if self._marks or messages[-1].get(CALLS):
            return None
        prompt = self._render(messages[:-1], tools, True)["text"]
        probe = self._render(_probed(messages, -1), tools, False)["text"]
        text = continue_prompt(prompt, probe, text_of(messages[-1]))
        if text is None:
            return None
        return Rendered(text, [[(len(prompt), len(text))]], marked=False)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        prompt: bool,
        beginnings: Sequence[tuple[int, bool]] = (),
    ) -> dict[str, Any]:
        """Returns the text, and the ends of prefixes in it (None if it isn't one)."""
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
            parts = any(isinstance(m.get("content"), list) for m in messages)
            hint = ". Perhaps it takes strings only, not parts: join their texts."
            raise ValueError(
                f"{self.name} can't render these {len(messages)} messages: "
                f"{answer['error']}{hint * parts}"
            )
        if (read := read_calls(messages, answer["text"])) != [*messages]:
            return self._render(read, tools, prompt, beginnings)
        check_parts(messages, answer["text"])
        return answer

    def _ask(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """Sends a request to the worker, after starting it with the template."""
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
                    f"{self.name} must render a text within {SECONDS:g} s and "
                    f"{MEMORY >> 20} MiB; it {limit}. It is faulty or malicious: use "
                    "the original publisher's."
                )
                raise ValueError(self._fault) from None
            except BaseException:  # the answer may still arrive later
                self._worker = None
                raise


def _probed(messages: Sequence[Message], turn: int) -> list[Message]:
    """Replaces the content of a turn by `PROBE`, in one part if it has parts."""
    others = [*messages]
    has_parts = isinstance(messages[turn].get("content"), list)
    probe = [{"type": "text", "text": PROBE}] if has_parts else PROBE
    others[turn] = {**messages[turn], "content": probe}
    return others


class _LimitError(Exception):
    """A template exceeded a limit."""


class _Worker:
    """A process that renders one template; it ends with this object."""

    def __init__(self):
        # Isolated and without site hooks; the first request contains the path.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(Path(chat_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C goes to the command only
        )
        self.end = weakref.finalize(self, _end, self._process)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          _LimitError: if a limit was exceeded or no answer comes.
          ValueError: if the request is not JSON.
        """
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages must be JSON values; {error}.") from error
        try:
            answer = json.loads(self._exchange(line))
        except (OSError, EOFError):
            self.end()
            code = self._process.returncode
            if code == -chat_worker.TIMEOUT_SIGNAL:
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


def _common(one: str, other: str) -> int:
    """Returns the length of the longest common prefix."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 - no paths


def _read_marks(marked: str) -> tuple[str, list[tuple[int, tuple[int, int]]]]:
    """Removes the marks from a text; returns it, and their positions and spans."""
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
