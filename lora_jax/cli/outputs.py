"""Where commands write: new files and folders."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.files.atomic import is_leftover, write_text
from lora_jax.finetune.errors import UserError


def new_file(out: str, data: str) -> Path:
    """Returns the file to write; raises where it can't be written or is the data."""
    target = Path(out)
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}.")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; it must be a file.")
    if target.exists() and Path(data).exists() and target.samefile(data):
        raise UserError(f"--out {target} is the data file itself; name another file.")
    return target


def new_folder(out: str) -> Path:
    """Returns the folder to write; raises if it holds more than a kill has left."""
    target = Path(out)
    is_free = target.is_dir() and all(is_leftover(p.name) for p in target.iterdir())
    if target.exists() and not is_free:
        raise UserError(f"--out {target} exists and is not empty; name a new folder.")
    return target


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines: all of them under the file's name, or none."""
    write_text(target, "".join(json.dumps(line) + "\n" for line in lines))
