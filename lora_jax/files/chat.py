"""Chat templates: messages to one text, and which of its characters the model says.

Templates come with models, so they are strangers' programs: they run in jinja2's
immutable sandbox, with the names and filters that transformers gives them. There is no
clock: ``strftime_now`` always tells midnight of 26 July 2024, the date that Llama 3's
templates write where nobody gives one, so the same data is the same text on any day.
"""

import datetime
import functools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lora_jax.files.optional import load_optional

ASSISTANT = "assistant"
# Characters that Unicode keeps free of meaning, as marks inside a rendered text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"

MAX_TEXT = 10**7  # characters, or bits of a number, that a template may multiply to
PADDING = ("ljust", "rjust", "center", "zfill", "expandtabs")  # methods of a text
FILTERS = ("center", "indent", "batch", "format")  # that pad, too
NOW = datetime.datetime(2024, 7, 26)  # for all templates, on every day
# What a template may raise, beside jinja2's own errors.
_RENDERING = (TypeError, ValueError, ArithmeticError, MemoryError, RecursionError)

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
    """A compiled chat template.

    Args:
      source: Jinja source.
      tokens: texts of special tokens by the names templates use, such as
        ``{"bos_token": "<s>"}``.

    Raises:
      ImportError: if jinja2 is not installed.
      ValueError: if the source is no template.

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

    def __init__(self, source: str, tokens: Mapping[str, str]):
        self._errors, environment = _environment()
        self.source, self._tokens = source, dict(tokens)
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        try:
            self._template = environment.from_string(source)
        except self._errors as error:
            raise ValueError(
                f"the chat template must be Jinja; it can't be read: {error}."
            ) from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        """Writes a conversation as one text.

        Args:
          messages: each with a ``role`` and a ``content``.
          add_generation_prompt: whether the text ends where an answer begins.

        Returns:
          The text.

        Raises:
          ValueError: if the messages are malformed, or the template refuses them.
        """
        check_messages(messages)
        text = self._render(messages, add_generation_prompt)
        return text.replace(OPEN, "").replace(CLOSE, "")

    def mark_assistant(self, messages: Sequence[Message]) -> Rendered:
        """Writes a conversation and finds what the assistant says in it.

        A template may say so itself, with ``{% generation %}``. Of any other, the text
        up to an assistant's turn (with the prompt to generate) and the text after it
        are rendered too; both must begin the whole text, and the turn is what lies
        between their ends.

        Args:
          messages: each with a ``role`` and a ``content``; one at least the
            assistant's.

        Returns:
          The text and the spans.

        Raises:
          ValueError: if there is no such turn, the template refuses the messages, or
            it writes earlier turns otherwise once later ones follow.
        """
        check_messages(messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT]
        if not turns:
            roles = [m["role"] for m in messages]
            raise ValueError(
                f"messages must hold a turn of the role {ASSISTANT!r}; got {roles[:8]}."
            )
        text = self._render(messages, False)
        if self._marks:
            return _read_marks(text)
        spans = []
        for turn in turns:
            before = self._render(messages[:turn], True)
            after = self._render(messages[: turn + 1], False)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template must write a conversation's beginning the same "
                    f"whatever follows; it does not before or after message {turn}, so "
                    "where the assistant's turn lies can't be told. Put {% generation "
                    "%} and {% endgeneration %} around it in the template, or give "
                    "prompt and completion."
                )
            spans.append((len(before), len(after)))
        return Rendered(text, spans, marked=False)

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except (*_RENDERING, *self._errors) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"the chat template can't write these {len(messages)} messages: "
                f"{reason}"
            ) from error


def check_messages(messages: Any) -> None:
    """Raises `ValueError` unless messages are a list with roles and contents."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            "messages must be a list of at least 1 message; got "
            f"{str(messages)[:40]!r}."
        )
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise ValueError(
                    f"message {i} must be an object with the strings role and content; "
                    f"its {key} is {str(value)[:40]!r}."
                )
        if OPEN in message["content"] or CLOSE in message["content"]:
            raise ValueError(
                f"message {i} must be text; it holds the noncharacter U+FDD0 or U+FDD1."
            )


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


def _environment() -> tuple[tuple[type[Exception], ...], Any]:
    """What a template may see and call: as in transformers, on one day for ever."""
    parts = ("jinja2", "jinja2.ext", "jinja2.nodes", "jinja2.sandbox", "jinja2.utils")
    jinja2 = load_optional("filling in a chat template", *parts)

    class Generation(jinja2.ext.Extension):
        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **values: Any):  # so that a value may be named self
            attributes = dict(*args[1:], **values)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template can't set {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any):
            del context
            _check_operator(operator, left, right)
            return self.binop_table[operator](left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **options: Any):
            _check_call(function, (*args, *options.values()))
            return super().call(context, function, *args, **options)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    for name in FILTERS:
        environment.filters[name] = _bounded(name, environment.filters[name])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = make_dict
    environment.globals["namespace"] = Namespace
    return (jinja2.TemplateError,), environment


def _check_size(what: str, size: int) -> None:
    """Raises where a template asks for a text or a number without measure."""
    if size > MAX_TEXT:
        raise ValueError(f"{what} asks for more than a text may hold")


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str | bytes):
        _check_percent(left, right)
        return
    sized = [len(x) for x in (left, right) if hasattr(x, "__len__")]
    whole = [abs(x) for x in (left, right) if isinstance(x, int)]
    size = 0  # floats overflow by themselves, other types raise
    if operator == "**" and len(whole) == 2:
        size = whole[0].bit_length() * whole[1]
    elif sized and whole:
        size = sized[0] * whole[0]
    elif len(whole) == 2:
        size = sum(x.bit_length() for x in whole)
    _check_size(operator, size)


def _check_percent(text: Any, values: Any) -> None:
    """Adds up the widths and precisions of a format; bytes are a TypeError."""
    form = text.partition("%")[2]
    widths = [int(number) for number in re.findall(r"\d+", form)]
    if "*" in form and isinstance(values, tuple):
        widths += [abs(value) for value in values if isinstance(value, int)]
    _check_size("%", sum(widths))


def _check_call(function: Any, values: Iterable[Any]) -> None:
    """Looks at the methods of texts that pad."""
    method = getattr(function, "__wrapped__", function)  # jinja2 wraps `format`
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(text, str) and name in ("format", "format_map"):
        specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)]
        if any("{" in spec for spec in specs):
            raise ValueError(f"{name} must be told its widths in the text itself")
        numbers = re.findall(r"\d+", " ".join(specs))
        _check_size(name, sum(int(number) for number in numbers))
    elif isinstance(text, str | bytes) and name in PADDING:
        repeats = len(text) if name == "expandtabs" else 1
        widths = (abs(value) for value in values if isinstance(value, int))
        _check_size(name, repeats * sum(widths))


def _bounded(name: str, function: Any) -> Any:
    """Returns a filter that takes no number without measure."""

    @functools.wraps(function)
    def bounded(value: Any, *args: Any, **options: Any) -> Any:
        if name == "format":
            _check_percent(str(value), args)
        else:
            lines = str(value).count("\n") + 1 if name == "indent" else 1
            numbers = (x for x in (*args, *options.values()) if isinstance(x, int))
            _check_size(name, lines * sum(abs(x) for x in numbers))
        return function(value, *args, **options)

    return bounded


def _strftime_now(form: str) -> str:
    _check_percent(form, ())
    return NOW.strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as text; jinja2's own filter would escape it for HTML."""
    if isinstance(indent, int):
        _check_size("tojson", indent * len(str(value)))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
