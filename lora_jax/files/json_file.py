"""Text and JSON of strangers: of bounded size, or an error that says why."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24


def read_text(file: Path, most: int = MAX_BYTES) -> str:
    """Reads a UTF-8 file of bounded size.

    Args:
      file: its path.
      most: bytes that it may have.

    Returns:
      The text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not UTF-8 or too large.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} must hold {file.name}; it has none.")
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
    """Reads a JSON object from a file of bounded size.

    Integers of 19 digits or more become floats, perhaps infinite: no field can use
    them, and who checks for an integer or a finite number refuses them.

    Args:
      file: its path.

    Returns:
      The object.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no JSON object or too large.
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
    """Parses JSON as `read_json` does.

    Args:
      text: the JSON.

    Returns:
      Its value.

    Raises:
      ValueError: if it is no JSON.
    """
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    """Reads an integer; one of over 64 bits as a float, for no field is so large."""
    return int(digits) if len(digits) < 19 else float(digits)
