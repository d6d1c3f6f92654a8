"""`lora-jax generate`: continues prompts or conversations."""

import argparse
import sys
import time
from collections import Counter
from typing import Any

import jax

from lora_jax.cli.adapters import parse_adapters, with_adapter
from lora_jax.cli.console import Console
from lora_jax.cli.pretrained import check_decoder, load_decoder
from lora_jax.files.messages import ASSISTANT, text_of
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.lines import check_faults
from lora_jax.finetune.turns import endless_turns
from lora_jax.interop.bank import load_bank
from lora_jax.models.generate import generate
from lora_jax.names import OWNER
from lora_jax.train.data import read_jsonl
from lora_jax.train.pairs import encode_source
from lora_jax.train.text import MESSAGES, kind_of

DEFAULT_TOKENS = 128


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Generates text; returns text, token ids and stop reason for each prompt."""
    adapters = parse_adapters(args.adapter)
    chats = _chats(args, adapters)
    names: list[str | None] = [chat.pop(OWNER, None) for chat in chats]
    if isinstance(adapters, dict):
        loaded, bank = load_bank(args.model, adapters)
        check_decoder(loaded)
    else:
        loaded = load_decoder(args.model, adapters, scan_layers=False)
        bank = None
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.path} has no tokenizer; generate needs one.")
    stop_tokens = _stop_tokens(args.stop, tokenizer)
    stop_texts = [stop for stop in args.stop if stop not in stop_tokens.values()]
    if chats:
        if loaded.family.has_source:
            raise UserError(
                f"{loaded.path} must be a decoder for --chat and --messages; it is an "
                "encoder–decoder, which answers plain text: use --prompt."
            )
        _warn_of_endless(tokenizer, args.stop)
        prompts = _encode(chats, tokenizer, args.messages)
        asked = [text_of(chat["messages"][-1]) for chat in chats]
    else:
        asked = args.prompt
        encode = encode_source if loaded.family.has_source else _encode_start
        prompts = [encode(text, tokenizer) for text in asked]
    if bank is not None and args.messages is None:  # each prompt by each adapter
        names = [name for name in bank.names for _ in prompts]
        prompts, asked = prompts * len(bank.names), asked * len(bank.names)
    room = loaded.config.max_positions - max(map(len, prompts))
    limit = args.max_new_tokens or max(1, min(DEFAULT_TOKENS, room))
    streams = [tokenizer.stream() for _ in prompts]
    written = [""] * len(prompts)
    stopped = [""] * len(prompts)
    is_streamed = len(prompts) == 1 and not out.as_json
    shown = 0

    def on_token(row: int, ids: list[int]) -> bool:
        nonlocal shown
        if ids[-1] in stop_tokens:
            stopped[row] = stop_tokens[ids[-1]]
            return True
        written[row] += streams[row].push(ids[-1])
        found = [s for s in stop_texts if s in written[row]]
        if found:
            stopped[row] = min(found, key=written[row].index)
            written[row] = written[row][: written[row].index(stopped[row])]
        if is_streamed:
            # Holds back what may be the start of a stop string.
            end = len(written[row]) if found else _safe(written[row], stop_texts)
            print(written[row][shown:end], end="", flush=True)
            shown = max(shown, end)
        return bool(found)

    start = time.perf_counter()
    tokens = generate(
        loaded.module if bank is None else bank.module,
        loaded.variables if bank is None else bank.variables(names),
        prompts,
        max_new_tokens=limit,
        stop_ids=tokenizer.special.stop_ids,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        key=jax.random.key(args.seed),
        on_token=on_token,
    )
    tokens = [ids[:-1] if ids and ids[-1] in stop_tokens else ids for ids in tokens]
    seconds = time.perf_counter() - start
    if is_streamed:
        print(written[0][shown:], flush=True)
    else:
        for row, (prompt, text) in enumerate(zip(asked, written, strict=True)):
            out.heading(prompt if bank is None else f"{names[row] or 'base'}: {prompt}")
            out.say(text)
    count = sum(len(ids) for ids in tokens)
    text = f"({count} tokens in {seconds:.1f} s, including compilation)"
    print(text, file=sys.stderr)
    return {
        "results": [
            {
                "prompt": prompt,
                **({} if bank is None else {OWNER: names[row]}),
                "text": written[row],
                "input_ids": prompts[row],
                "output_ids": tokens[row],
                "stopped_by": _reason(stopped[row], len(tokens[row]), limit),
            }
            for row, prompt in enumerate(asked)
        ],
        "seconds": round(seconds, 3),
    }


def _encode_start(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a text that a decoder goes on with."""
    return tokenizer.encode_text(text).ids


def _chats(
    args: argparse.Namespace, adapters: str | dict[str, str] | None
) -> list[dict[str, Any]]:
    """Returns the conversations to continue; none for plain prompts."""
    if args.system is not None and not args.chat:
        raise UserError("--system requires --chat: it is the system message.")
    if args.messages is None:
        system = [] if args.system is None else [_message("system", args.system)]
        texts = args.prompt if args.chat else []
        return [{"messages": [*system, _message("user", text)]} for text in texts]
    if args.chat:
        raise UserError("--chat requires --prompt; --messages are always chats.")
    chats = read_jsonl(args.messages, fields={}, check=with_adapter(_fault, adapters))
    for chat in chats:
        while chat["messages"][-1]["role"] == ASSISTANT:
            del chat["messages"][-1]
    return chats


def _fault(record: dict[str, Any]) -> str:
    """Returns an error message for a line that can't be answered; empty if valid."""
    try:
        kind = kind_of(record)
    except ValueError as error:
        return str(error)
    if kind != MESSAGES:
        return f"must be messages; it is {kind}"
    messages = record["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str)
        for message in messages
    ):
        return "messages must be a list of objects, each with a role"
    if all(message["role"] == ASSISTANT for message in messages):
        return f"messages must contain one that is not the {ASSISTANT}'s, to answer"
    return ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _encode(
    chats: list[dict[str, Any]], tokenizer: Tokenizer, path: str | None
) -> list[list[int]]:
    prompts, faults = [], []
    for number, chat in enumerate(chats, start=1):
        try:
            found = tokenizer.encode_prompt(chat["messages"], tools=chat.get("tools"))
        except ValueError as error:
            faults.append(f"{path or '--prompt'}: example {number}: {error}")
        else:
            prompts.append(found)
    check_faults("conversations that can't be rendered", faults)
    return prompts


def _stop_tokens(stops: list[str], tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the stop strings that are special tokens, which are not in any text."""
    special = tokenizer.special_ids
    for stop in stops:
        inside = [text for text in special if text in stop and text != stop]
        if inside and stop not in special:
            raise UserError(
                f"--stop {stop!r} must be a text or a special token; it contains the "
                f"token {inside[0]!r}, which no text does. Use just the token."
            )
    return {special[stop]: stop for stop in stops if stop in special}


def _warn_of_endless(tokenizer: Tokenizer, stops: list[str]) -> None:
    """Warns if the chat template's turns don't end in a stop token."""
    try:
        chats = tokenizer.encode_chat([_message("user", "?"), _message(ASSISTANT, "!")])
    except ValueError:  # the template may not support this
        return
    ends = Counter(end for chat in chats for end in chat.ends)
    for end in [*ends]:
        if tokenizer.decode([end], skip_special=False) in stops:
            del ends[end]
    if warning := endless_turns(tokenizer, ends):
        print(f"lora-jax generate: warning: {warning}", file=sys.stderr)


def _safe(text: str, stops: list[str]) -> int:
    """Returns the length of ``text`` before any possible start of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)


def _reason(stop: str, count: int, limit: int) -> str:
    if stop:
        return f"stop string {stop!r}"
    return "max_new_tokens" if count == limit else "stop token"
