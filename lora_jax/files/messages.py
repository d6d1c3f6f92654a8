"""Validating the messages and tools of a conversation before it is rendered.

Templates accept anything: they render a turn of the role ``usr`` and ignore unknown
keys. Neither shows in the loss, so both are errors here. A template is assumed to know
the words in its source.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.files.chat_worker import CLOSE, OPEN
from lora_jax.train.examples import nearest

Message = Mapping[str, Any]

ASSISTANT = "assistant"
PROBE = "\ufdd2"  # a character that no message has any use for
WEIGHT = "weight"  # 0 for a turn not trained on; removed before rendering
CALLS = "tool_calls"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
KEYS = ("role", "content", CALLS, "tool_call_id", "name", WEIGHT)


def check_messages(messages: Any, words: Collection[str]) -> None:
    """Raises unless a template can render a conversation completely.

    Args:
      messages: a list of objects. Each has a ``role``, one of `ROLES` or a word of the
        template, and as ``content`` a string or a list of parts such as ``{"type":
        "text", "text": ...}``. It may be null or absent if there are ``tool_calls``.
        Other keys must be in `KEYS` or words of the template.
      words: names and strings in the template's source.

    Raises:
      ValueError: naming the first invalid message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            "messages must be a list of at least 1 message; got "
            f"{str(messages)[:40]!r}."
        )
    for i, message in enumerate(messages):
        if fault := _fault(message, words):
            raise ValueError(f"message {i} {fault}.")


def check_tools(tools: Any, words: Collection[str]) -> None:
    """Raises a `ValueError` unless tools are None or objects that a template renders.

    Args:
      tools: JSON schemas; may be empty.
      words: names and strings in the template's source.
    """
    if not isinstance(tools, list | tuple | None) or not all(
        isinstance(tool, Mapping) for tool in tools or ()
    ):
        raise ValueError(
            f"tools must be a list of objects, JSON schemas; got {str(tools)[:40]!r}."
        )
    if tools and "tools" not in words:
        raise ValueError(
            "tools must be empty, because the chat template doesn't use them; got "
            f"{len(tools)}. Put them in a system message."
        )


def read_calls(messages: Sequence[Message], text: str) -> list[Message]:
    """Returns messages whose calls have objects where strings were put in quotes.

    OpenAI's files contain a call's arguments as JSON strings; most templates expect the
    object.

    Args:
      messages: valid according to `check_messages`.
      text: the rendered messages.

    Raises:
      ValueError: if such a string is not a JSON object.
    """
    read = []
    for i, message in enumerate(messages):
        calls = message.get(CALLS)
        if isinstance(calls, list):
            message = {**message, CALLS: [_read_call(each, i, text) for each in calls]}
        read.append(message)
    return read


def _read_call(call: Any, turn: int, text: str) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    given = function.get("arguments") if isinstance(function, Mapping) else None
    quoted = json.dumps(given, ensure_ascii=False)
    if not isinstance(given, str) or quoted == f'"{given}"' or quoted not in text:
        return call
    try:
        arguments = json.loads(given)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"message {turn} must have an object, or one in JSON, as arguments of its "
            f"{CALLS}; got {given[:40]!r}."
        )
    read = {**function, "arguments": arguments}
    return {**call, "function": read} if "function" in call else read


def text_of(message: Message) -> str:
    """Returns a message's text, that of its parts joined; empty if it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def check_parts(messages: Sequence[Message], text: str) -> None:
    """Raises a `ValueError` if parts were rendered as Python writes a list.

    Templates that expect a string as content do so.
    """
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and str(content[0]) in text:
            raise ValueError(
                f"message {i} must have a string as content: the chat template "
                "doesn't read parts. Join their texts."
            )


def counted_turns(messages: Sequence[Message]) -> list[int]:
    """Returns the indices of the messages trained on: the assistant's, unless weight 0.

    Raises a `ValueError` if there are none.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT]
    if not turns:
        roles = [m["role"] for m in messages]
        raise ValueError(
            f"messages must have a turn with the role {ASSISTANT!r}; got {roles[:8]}."
        )
    counted = [i for i in turns if messages[i].get(WEIGHT) != 0]
    if not counted:
        raise ValueError(
            f"messages must have a turn with the role {ASSISTANT!r} and weight 1; all "
            f"{len(turns)} have weight 0."
        )
    return counted


def _fault(message: Any, words: Collection[str]) -> str:
    if not isinstance(message, Mapping):
        return f"must be an object; got {str(message)[:40]!r}"
    for key in message:
        if key not in KEYS and key not in words:
            hint = nearest(str(key), KEYS)
            return f"has an unknown key, {str(key)[:40]!r}; {hint}"
    role, content, weight = (message.get(k) for k in ("role", "content", WEIGHT))
    calls = message.get(CALLS)
    if not isinstance(role, str):
        return f"must have a string as role; got {str(role)[:40]!r}"
    if role not in ROLES and role not in words:
        return f"has an unknown role, {role[:40]!r}; {nearest(role, ROLES)}"
    if isinstance(content, list) and content:
        if fault := next(filter(None, map(_part_fault, content)), ""):
            return fault
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        return f"must have a string as content; got {str(content)[:40]!r}"
    if OPEN in (content or "") or CLOSE in (content or ""):
        return "must be text; it contains the noncharacter U+FDD0 or U+FDD1"
    if calls and not isinstance(calls, list):
        return f"must have a list as {CALLS}; got {str(calls)[:40]!r}"
    if calls and CALLS not in words:
        return f"has {CALLS}, which the chat template doesn't use"
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f"must have a weight of 0 or 1; got {str(weight)[:40]!r}"
    if weight and role != ASSISTANT:
        return f"must have a weight of 0: only turns of {ASSISTANT!r} are trained on"
    return ""


def _part_fault(part: Any) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return f"must have objects with a type as parts; got {str(part)[:40]!r}"
    if part["type"] != "text":
        return (
            f"must have parts of the type 'text' only; got {part['type'][:40]!r}: "
            "a language model here reads no images, audio or video"
        )
    if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
        return f"must have a string as text of each part; got {str(part)[:60]!r}"
    return ""


def continue_prompt(prompt: str, probe: str, content: str) -> str | None:
    """Returns a turn as it is generated where the template drops its thoughts.

    Args:
      prompt: the text before the turn, which ends with ``<think>``, say.
      probe: the text up to and with the turn, `PROBE` in place of its content.
      content: of the turn; begins as the prompt ends.

    Returns:
      The text, which begins with ``prompt``; None if it can't be told.

    Example:
      >>> continue_prompt("A:<think>", f"A:{PROBE};", "<think>t</think>a")
      'A:<think>t</think>a;'
    """
    before, _, after = probe.partition(PROBE)
    opened = prompt.removeprefix(before).strip()
    starts = prompt.startswith(before) and content.startswith(opened)
    if probe.count(PROBE) != 1 or not opened or not starts:
        return None
    return prompt + content.removeprefix(opened).lstrip() + after
