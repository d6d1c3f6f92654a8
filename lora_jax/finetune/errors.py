"""Errors caused by the user's input or environment rather than by bugs."""

import errno


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


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error says that a disk has no space left."""
    return isinstance(error, OSError) and (
        error.errno == errno.ENOSPC or "disk" in str(error)
    )
