"""Errors that are answers to the user, not faults of the program."""


class UserError(Exception):
    """An error the user can fix; shown without a traceback.

    Attributes:
      code: exit code of the process: 2 for bad input, 130 for Ctrl-C, 1 for a machine
        that could not do it (a full disk).
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code
