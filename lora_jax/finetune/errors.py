"""Errors caused by the user's input or environment rather than by bugs."""

import errno
from pathlib import Path


class UserError(Exception):
    """An error the user can fix; the command line shows it without a traceback.

    Attributes:
      code: exit code of the command: 2 for invalid input, 130 for Ctrl-C, 1 for an
        environment failure (a full disk).
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class DivergedError(UserError):
    """A run whose loss is not finite; the message suggests what to change."""

    def __init__(self, message: str):
        super().__init__(message, code=1)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM; the message tells how to resume it.

    Attributes:
      is_orderly: whether all processes of the run stopped after the same step.
    """

    def __init__(self, message: str, *, is_orderly: bool):
        super().__init__(message)
        self.is_orderly = is_orderly


def disk_fault(error: BaseException, folder: Path) -> str | None:
    """Returns what an error says of the disk of a folder; None if it is another."""
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOSPC:
        return f"the disk of {folder} is full ({error}). Free some space."
    return str(error) if "disk" in str(error) else None
