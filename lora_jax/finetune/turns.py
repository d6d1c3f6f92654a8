"""Checking that the assistant's turns end in a stop token."""

from collections.abc import Mapping

from lora_jax.files.tokenizer import Tokenizer


def endless_turns(tokenizer: Tokenizer, ends: Mapping[int, int]) -> str:
    """Returns a warning if turns don't end in a stop token, or the empty string.

    A model trained on such turns continues generating after them.

    Args:
      tokenizer: the model's tokenizer.
      ends: how often each token ends a turn.
    """
    stops = tokenizer.special.stop_ids
    others = {i: n for i, n in ends.items() if i not in stops}
    if not others:
        return ""

    def text(token: int) -> str:
        return repr(tokenizer.decode([token], skip_special=False))

    known = ", ".join(map(text, stops)) or "the model has none"
    last = max(others, key=others.__getitem__)
    return (
        f"the assistant's turns end in {text(last)} ({sum(others.values()):,} of "
        f"{sum(ends.values()):,}), which is not a stop token ({known}): generation "
        "continues after it. Add it to the eos_token_id of generation_config.json, "
        "pass it to generate with --stop, or end the chat template's turns in a stop "
        "token."
    )
