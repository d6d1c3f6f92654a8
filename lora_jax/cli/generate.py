"""`lora-jax generate`: text after a prompt, as it comes."""

import argparse
import sys
import time
from typing import Any

import jax

from lora_jax.cli.console import Console
from lora_jax.cli.pretrained import load_decoder
from lora_jax.finetune.errors import UserError
from lora_jax.models.generate import generate

DEFAULT_TOKENS = 128


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Generates.

    Args:
      args: ``model``, ``adapter``, ``prompt`` (a list), ``max_new_tokens``,
        ``temperature``, ``top_p``, ``top_k``, ``seed``, ``stop``, ``chat``.
      out: where to print; one prompt's text is streamed.

    Returns:
      For each prompt the text, its token ids, and why it ended.
    """
    loaded = load_decoder(args.model, args.adapter, is_scanned=False)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.path} has no tokenizer; generate needs one.")
    texts = args.prompt
    if args.chat:
        texts = [tokenizer.render_chat([{"role": "user", "content": t}]) for t in texts]
    prompts = [tokenizer.encode_text(text).ids for text in texts]
    room = loaded.config.max_positions - max(map(len, prompts))
    limit = args.max_new_tokens or max(1, min(DEFAULT_TOKENS, room))
    streams = [tokenizer.stream() for _ in prompts]
    written = [""] * len(prompts)
    stopped = [""] * len(prompts)
    is_streamed = len(prompts) == 1 and not out.as_json
    shown = 0

    def on_token(row: int, ids: list[int]) -> bool:
        nonlocal shown
        written[row] += streams[row].push(ids[-1])
        found = [s for s in args.stop if s in written[row]]
        if found:
            stopped[row] = min(found, key=written[row].index)
            written[row] = written[row][: written[row].index(stopped[row])]
        if is_streamed:
            # What may be the beginning of a stop string waits.
            end = len(written[row]) if found else _safe(written[row], args.stop)
            print(written[row][shown:end], end="", flush=True)
            shown = max(shown, end)
        return bool(found)

    start = time.perf_counter()
    tokens = generate(
        loaded.module,
        loaded.variables,
        prompts,
        max_new_tokens=limit,
        stop_ids=tokenizer.special.stop_ids,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        key=jax.random.key(args.seed),
        on_token=on_token,
    )
    seconds = time.perf_counter() - start
    if is_streamed:
        print(written[0][shown:], flush=True)
    else:
        for prompt, text in zip(args.prompt, written, strict=True):
            out.heading(prompt)
            out.say(text)
    count = sum(len(ids) for ids in tokens)
    print(f"({count} tokens in {seconds:.1f} s, compiling included)", file=sys.stderr)
    return {
        "results": [
            {
                "prompt": prompt,
                "text": text,
                "input_ids": ids,
                "output_ids": new,
                "stopped_by": _reason(stop, len(new), limit),
            }
            for prompt, text, ids, new, stop in zip(
                args.prompt, written, prompts, tokens, stopped, strict=True
            )
        ],
        "seconds": round(seconds, 3),
    }


def _safe(text: str, stops: list[str]) -> int:
    """How much of ``text`` can't be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)


def _reason(stop: str, count: int, limit: int) -> str:
    if stop:
        return f"stop string {stop!r}"
    return "max_new_tokens" if count == limit else "stop token"
