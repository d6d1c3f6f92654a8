"""Which tokens of a rendered conversation are the assistant's."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_jax.files.chat import Rendered


class ChatTokens(NamedTuple):
    """A conversation as token ids.

    Attributes:
      ids: the tokens of the rendered template.
      mask: 1 for each of the assistant's tokens, 0 for the others.
      ends: the last token of each of its turns, ignoring white space.
    """

    ids: list[int]
    mask: list[int]
    ends: list[int]


def mark_tokens(
    rendered: Rendered,
    ids: list[int],
    spans: Sequence[tuple[int, int]],
    stop_ids: Collection[int],
) -> ChatTokens:
    """Marks the tokens of the assistant's turns.

    A token that overlaps a turn belongs to it. If only white space follows a turn's
    last stop token, the turn ends there, as generation does. A template's own marks are
    used as they are.

    Args:
      rendered: the conversation.
      ids: its tokens.
      spans: the ``(start, end)`` of each token in the text.
      stop_ids: the tokens that end a generation.

    Returns:
      Ids, mask and ends.

    Example:
      >>> rendered = Rendered("q? a! q", [[(3, 6)]], marked=False)
      >>> mark_tokens(rendered, [5, 6, 7, 8], [(0, 2), (2, 4), (4, 5), (5, 7)], {7})
      ChatTokens(ids=[5, 6, 7, 8], mask=[0, 1, 1, 0], ends=[7])
    """
    text = rendered.text
    mask, ends = [0] * len(ids), []
    for turn in rendered.turns:
        inside = [
            i
            for i, (a, b) in enumerate(spans)
            if any(a < end and b > start for start, end in turn)
        ]
        # Up to the last stop token followed by white space only, else to the end.
        stops = [
            n
            for n, i in enumerate(inside)
            if ids[i] in stop_ids and not text[spans[i][1] : turn[-1][1]].strip()
        ]
        if stops:
            said = inside[: stops[-1] + 1]
            inside = inside if rendered.marked else said
        else:
            said = [i for i in inside if text[slice(*spans[i])].strip()]
        for i in inside:
            mask[i] = 1
        ends += [ids[i] for i in said[-1:]]
    return ChatTokens(ids, mask, ends)
