"""Which tokens of a rendered conversation the assistant says."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_jax.files.chat import Rendered


class ChatTokens(NamedTuple):
    """A conversation as token ids.

    Attributes:
      ids: the tokens of the rendered template.
      mask: 1 for each token that the assistant says, 0 for the others.
      ends: the last token of each of its turns, white space aside.
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

    A token that reaches into a turn belongs to it. If only white space follows a turn's
    last stop token, the turn ends there: the model stops too. A template's own marks
    are taken as they are.

    Args:
      rendered: the conversation.
      ids: its tokens.
      spans: of each token, ``(start, end)`` in the text.
      stop_ids: of the tokens that end a generation.

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
        # Up to the last stop token with white space alone after it, or else to the end.
        stop = next(
            (
                n
                for n, i in reversed([*enumerate(inside)])
                if ids[i] in stop_ids and not text[spans[i][1] : turn[-1][1]].strip()
            ),
            None,
        )
        if stop is None:
            said = [i for i in inside if text[slice(*spans[i])].strip()]
        else:
            said = inside[: stop + 1]
            inside = inside if rendered.marked else said
        for i in inside:
            mask[i] = 1
        ends += [ids[i] for i in said[-1:]]
    return ChatTokens(ids, mask, ends)
