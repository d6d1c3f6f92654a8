"""The `lora-jax` command: dispatch, exit codes and error messages.

JAX and the command's module are imported only once the arguments are parsed, so that
``--help`` and usage errors are fast.

Exit codes: 0 success, 2 invalid input, 130 interrupted, 1 other errors.
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

TRAIN = (
    *("yaml", "pydantic", "rich", "safetensors", "tokenizers", "huggingface_hub"),
    *("PIL", "gguf", "jinja2"),
)
EXTRAS = {**dict.fromkeys(TRAIN, "train"), "libtpu": "tpu-plan"}  # by package


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments after ``lora-jax``; by default those of the process.

    Returns:
      The exit code.
    """
    args = parse(argv)
    if argv is None:
        huge_pages.enable()  # restarts: steps on a CPU then take 0.82 of the time
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nlora-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader exited (`lora-jax inspect DIR | head`), which is not an error.
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
        if args.command == "train":  # may be one of several processes
            from lora_jax.parallel.processes import leave

            leave(code)
        return code


def _run(args: argparse.Namespace) -> int:
    console = importlib.import_module("lora_jax.cli.console")
    out = console.Console(as_json=args.json)
    _configure_jax()
    command = importlib.import_module(f"lora_jax.cli.{args.command}")
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, args.command)
        out.finish(command.run(args, out))
    return 0


def _show_warning(command: str, message: Warning | str, *_: object) -> None:
    """Shows a warning without its source line."""
    print(f"lora-jax {command}: warning: {message}", file=sys.stderr)


def _explain(error: Exception) -> tuple[int, str]:
    """Returns the exit code and the message of an error."""
    if isinstance(error, ModuleNotFoundError) and (
        extra := EXTRAS.get((error.name or "").split(".")[0])
    ):
        return 1, f'`{error.name}` is not installed: pip install "lora_jax[{extra}]"'
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code, str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            where = f" ({error.filename})" if error.filename else ""
            return 1, f"the disk is full{where}. Free some space and try again."
        return 2, str(error)
    if isinstance(error, (ValueError, ImportError)):
        return 2, str(error)
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        first = str(error).partition("\n")[0][:200]
        return 1, (
            f"the device is out of memory: {first}\nA smaller train.batch_size or "
            "data.max_length needs less, and so do a larger train.accumulate, "
            "model.remat=block and model.param_dtype=bfloat16; `lora-jax plan` shows "
            "what fits."
        )
    return 1, (
        f"{type(error).__name__}: {error}\nThis is a bug in lora_jax; --debug shows "
        "the traceback."
    )


def _configure_jax() -> None:
    """Silences XLA's logs and caches its compiled programs on disk."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    jax = importlib.import_module("jax")
    if jax.config.jax_compilation_cache_dir is None:
        default = os.path.expanduser("~/.cache/lora_jax")
        root = os.environ.get("LORA_JAX_CACHE") or default
        folder = os.path.join(root, "xla", _cpu())
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _cpu() -> str:
    """Identifies the CPU type: code compiled for one may not run on another."""
    import hashlib
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            features = sorted({x for x in file if x.startswith(("flags", "Feat"))})
    except OSError:
        features = [platform.processor()]
    text = "".join([platform.machine(), *features])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
