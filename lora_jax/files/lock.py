"""A lock file: one process at a time, and a dead one never in the way."""

import contextlib
import fcntl
import gc
import json
import os
import socket
import weakref
from pathlib import Path


class LockedError(Exception):
    """Another process has the lock; the message names it."""


class Lock:
    """Holds a lock file until `release`, or until this object or the process ends.

    The file says whose the lock is. That it is held is a lock of the operating system,
    which ends with its process however that ends: what a killed process has written is
    not believed.

    Args:
      path: the file; made if absent, and removed when the lock is released.

    Raises:
      LockedError: if another has it, naming its process and host.
      OSError: if the file is a link, or can't be written.
    """

    def __init__(self, path: Path):
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        handle = _take(path)
        if handle is None:
            owner = _read(path)
            if owner == me:
                gc.collect()  # this process's own, if nobody refers to it any more
                handle = _take(path)
            if handle is None:
                raise LockedError(f"{path} is held by {_named(owner)}")
        os.ftruncate(handle, 0)
        os.pwrite(handle, me.encode(), 0)
        self.release = weakref.finalize(self, _release, path, handle)


def _take(path: Path) -> int | None:
    """Opens and locks the file, or returns None if another process has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    while True:
        handle = os.open(path, flags, 0o666)
        if not is_locked(handle):
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its owner has just removed it


def _release(path: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(handle)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 10).decode("utf-8", "replace")
    except OSError:
        return ""


def is_locked(handle: int) -> bool:
    """Takes an open file's lock, which ends when the file is closed.

    Args:
      handle: of the file.

    Returns:
      Whether it is this process's now; False if another has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _named(owner: str) -> str:
    try:
        found = json.loads(owner)
        return f"process {int(found['pid'])} on {str(found['host'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
