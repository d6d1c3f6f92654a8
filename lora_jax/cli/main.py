"""The `lora-jax` command: its sub-commands, its exit codes, its last line of defence.

Nothing heavy is imported here: JAX and the files behind a command load once the command
is known, so that ``--help`` and a misspelt option answer at once.

Exit codes: 0 done, 2 bad input, 130 interrupted, 1 anything else.
"""

import argparse
import errno
import functools
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from lora_jax.cli import huge_pages
from lora_jax.cli.parser import parse

OPTIONAL = {
    "yaml": "train",
    "pydantic": "train",
    "rich": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "huggingface_hub": "train",
    "PIL": "train",
    "gguf": "train",
    "jinja2": "train",
    "libtpu": "tpu-plan",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after ``lora-jax``; those of the process by default.

    Returns:
      The exit code.
    """
    args = parse(argv)
    if argv is None:
        huge_pages.ask()  # starts anew: a CPU's steps then take 0.82 of the time
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nlora-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`lora-jax inspect DIR | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        code, message = _explain(error)
        message = "\n".join([message, *getattr(error, "__notes__", [])])
        who = getattr(args, "process_id", None)
        name = args.command if who is None else f"{args.command}, process {who}"
        print(f"lora-jax {name}: {message}", file=sys.stderr)
        if args.command == "train":  # the one that may be one of many processes
            from lora_jax.parallel.processes import leave

            leave(code)
        return code


def _run(args: argparse.Namespace) -> int:
    console = importlib.import_module("lora_jax.cli.console")
    out = console.Console(as_json=args.json)
    _quiet_and_cached()
    command = importlib.import_module(f"lora_jax.cli.{args.command}")
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, args.command)
        out.finish(command.run(args, out))
    return 0


def _show_warning(command: str, message: Warning | str, *_: object) -> None:
    """Shows what a warning says, without the line of code that gave it."""
    print(f"lora-jax {command}: warning: {message}", file=sys.stderr)


def _explain(error: Exception) -> tuple[int, str]:
    """Returns the exit code and the message of an error."""
    if isinstance(error, ModuleNotFoundError) and (
        extra := OPTIONAL.get((error.name or "").split(".")[0])
    ):
        return 1, f'`{error.name}` is not installed: pip install "lora_jax[{extra}]"'
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code, str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            where = f" ({error.filename})" if error.filename else ""
            return 1, f"the disk is full{where}. Free some space and run it again."
        return 2, str(error)
    if isinstance(error, (ValueError, ImportError)):
        return 2, str(error)
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        first = str(error).partition("\n")[0][:200]
        return 1, (
            f"the device's memory is full: {first}\nA smaller train.batch_size or "
            "data.max_length takes less, so do a larger train.accumulate, "
            "model.remat=block and model.param_dtype=bfloat16; `lora-jax plan` says "
            "what fits."
        )
    return 1, (
        f"{type(error).__name__}: {error}\nThis is a fault of lora_jax, not yours; "
        "--debug shows where."
    )


def _quiet_and_cached() -> None:
    """Keeps XLA's chatter out, and its compiled programs for the next start."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    jax = importlib.import_module("jax")
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("LORA_JAX_CACHE") or os.path.expanduser(
            "~/.cache/lora_jax"
        )
        jax.config.update(
            "jax_compilation_cache_dir", os.path.join(root, "xla", _cpu())
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _cpu() -> str:
    """Names this kind of CPU: code compiled for one may not run on another."""
    import hashlib
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            features = sorted(
                {line for line in file if line.startswith(("flags", "Feat"))}
            )
    except OSError:
        features = [platform.processor()]
    text = "".join([platform.machine(), *features])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
