"""Atomic writes: files and folders appear complete, or not at all.

Data goes to a new temporary file or folder beside the target, whose name can't be
guessed, so that no planted symlink is followed. The data is synced before the rename,
the parent folder after it: a crash or a power cut leaves the old file or the new one.
Temporary files left by killed processes are unlocked; the next write removes them.
"""

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_jax.files.lock import try_lock

SUFFIX = ".tmp"
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replaces a file atomically; a symlink is replaced, not followed.

    Args:
      path: the file, which need not exist.

    Yields:
      An empty temporary file to write to, renamed to ``path`` on success and removed
      after an error.
    """
    path = Path(path)
    _remove_leftovers(path.parent, path.name)
    handle, name = tempfile.mkstemp(SUFFIX, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        try_lock(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes several files to a folder, none of them before all are complete.

    Args:
      path: the folder. If absent, it is created atomically; otherwise files of the same
        names are replaced one right after the other, and others stay.

    Yields:
      An empty temporary folder to write to, removed after an error.
    """
    path = Path(path)
    is_there = path.is_dir()
    home = path if is_there else path.parent
    home.mkdir(parents=True, exist_ok=True)
    for folder in {home, path.parent}:
        _remove_leftovers(folder, path.name)
    temporary = Path(tempfile.mkdtemp(SUFFIX, f".{path.name}.", home))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        try_lock(handle)
        yield temporary
        entries = sorted(temporary.rglob("*"))
        for entry in entries:
            _sync(entry)
        if is_there:
            for file in entries:
                place = path / file.relative_to(temporary)
                if file.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    file.replace(place)
        else:
            temporary.chmod(0o777 & ~_umask())
            _sync(temporary)
            temporary.rename(path)
        _sync(home)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Appends to a UTF-8 file, created if absent; a symlink is an `OSError`."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)


def is_leftover(name: str) -> bool:
    """Returns whether a file or folder name is that of a temporary one."""
    return _LEFTOVER.fullmatch(name) is not None


def _remove_leftovers(folder: Path, name: str) -> None:
    """Removes temporary files of ``name`` left by killed processes (unlocked ones)."""
    for entry in folder.glob(f".{glob.escape(name)}.*{SUFFIX}"):
        found = _LEFTOVER.fullmatch(entry.name)
        if found is None or found[1] != name or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):
            handle = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if try_lock(handle):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Flushes a file's contents or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems can't sync folders
            raise
    finally:
        os.close(handle)
