"""Whether the assistant's turns end where a generation does."""

from collections.abc import Mapping

from lora_jax.files.tokenizer import Tokenizer


def endless_turns(tokenizer: Tokenizer, ends: Mapping[int, int]) -> str:
    """Says which turns end in no stop token; a model that learns them writes on.

    Args:
      tokenizer: the model's.
      ends: how often each token ends a turn.

    Returns:
      A sentence with what to do; empty if all turns end in one.
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
        "continues after it. Name it in the eos_token_id of generation_config.json, or "
        "to generate by --stop, or end the chat template's turns in a stop token."
    )
