"""A lock file: one process at a time, and a dead one never in the way."""

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
      path: the file; made if absent, and left when the lock is released.

    Raises:
      LockedError: if another has it, naming its process and host.
      OSError: if the file is a link, or can't be written.
    """

    def __init__(self, path: Path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o666)
        self.release = weakref.finalize(self, os.close, handle)
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        if not is_locked(handle):
            owner = os.pread(handle, 1 << 10, 0).decode("utf-8", "replace")
            if owner == json.dumps(me):
                gc.collect()  # this process's own, if nobody refers to it any more
            if owner != json.dumps(me) or not is_locked(handle):
                self.release()
                raise LockedError(f"{path} is held by {_named(owner)}")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)


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
