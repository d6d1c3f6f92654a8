"""JSON files of strangers: one object, of bounded size, or an error that says why."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of bounded size.

    Args:
      file: its path.

    Returns:
      The object.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no JSON object or too large.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} must hold {file.name}; it has none.")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{file} must be a config of at most {MAX_BYTES} bytes; it has "
            f"{file.stat().st_size}."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON; it can't be read: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file} must be a JSON object; got {type(settings).__name__}."
        )
    return settings
