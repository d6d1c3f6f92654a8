"""Checking and writing the output files and folders of commands."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.files.atomic import is_leftover, write_text
from lora_jax.finetune.errors import UserError


def new_file(out: str, data: str) -> Path:
    """Returns the file to write; raises if it can't be written or is the data file."""
    target = Path(out)
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: the folder {target.parent} does not exist.")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; it must be a file.")
    if target.exists() and Path(data).exists() and target.samefile(data):
        raise UserError(f"--out {target} is the data file itself; name another file.")
    return target


def new_folder(out: str) -> Path:
    """Returns the folder to write; raises unless it is empty, except for leftovers."""
    target = Path(out)
    is_free = target.is_dir() and all(is_leftover(p.name) for p in target.iterdir())
    if target.exists() and not is_free:
        raise UserError(f"--out {target} exists and is not empty; name a new folder.")
    return target


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines atomically."""
    write_text(target, "".join(json.dumps(line) + "\n" for line in lines))
