"""A lock file for one process at a time, never left locked by a dead one."""

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

    The file's contents only name the owner. The lock itself is the operating system's,
    which ends with the process, even if that is killed.

    Args:
      path: the file; created if absent, and removed on release.

    Raises:
      LockedError: if another process has it; names the process and host.
      OSError: if the file is a symlink, or can't be written.
    """

    def __init__(self, path: Path):
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        handle = _take(path)
        if handle is None:
            owner = _read(path)
            if owner == me:
                gc.collect()  # releases a lock of this process without references
                handle = _take(path)
            if handle is None:
                raise LockedError(f"{path} is held by {_named(owner)}")
        os.ftruncate(handle, 0)
        os.pwrite(handle, me.encode(), 0)
        self.release = weakref.finalize(self, _release, path, handle)


def _take(path: Path) -> int | None:
    """Opens and locks the file; None if another process has the lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    while True:
        handle = os.open(path, flags, 0o666)
        if not try_lock(handle):
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the owner has just removed it


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


def try_lock(handle: int) -> bool:
    """Locks an open file until it is closed; False if another process has the lock."""
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
