"""Untrusted text and JSON files, of bounded size."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24


def read_text(file: Path, most: int = MAX_BYTES) -> str:
    """Reads a UTF-8 file of at most ``most`` bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not UTF-8 or too large.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} must contain {file.name}.")
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(
            f"{file} must have at most {most} bytes; it has {file.stat().st_size}."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8; byte {error.start} is not.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of bounded size; see `parse_json`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a JSON object or too large.
    """
    text = read_text(file)
    try:
        settings = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON; it can't be read: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file} must be a JSON object; got {type(settings).__name__}."
        )
    return settings


def parse_json(text: str) -> Any:
    """Parses JSON; integers of 19 digits or more become floats, possibly infinite.

    No field is that large, so checks for integers or finite numbers reject them.
    """

    def parse_int(digits: str) -> int | float:
        return int(digits) if len(digits) < 19 else float(digits)

    return json.loads(text, parse_int=parse_int)
