"""Writing files: complete under their names, or not there at all.

What is written goes to a temporary file or folder beside its place, whose name nobody
can guess and which must be new, so that no link that somebody has put there is written
through. Its bytes are on the disk before it takes the name, and the folder is after:
a kill or a power cut leaves the old file or the new one. What a kill leaves of the
temporary ones is unlocked, and goes with the next write.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_jax.files.lock import is_locked

SUFFIX = ".tmp"
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replaces a file once its successor is written.

    Args:
      path: the file, there or not; a link there is replaced, not followed.

    Yields:
      An empty file beside it, to write. In the end it takes the name; after an error
      it is gone, and what had the name is as it was.
    """
    path = Path(path)
    _remove_leftovers(path.parent, path.name)
    handle, name = tempfile.mkstemp(SUFFIX, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        is_locked(handle)
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
    """Fills a folder with files at once, once all of them are written.

    Args:
      path: the folder. If it is absent it appears whole; else files of the same names
        are replaced, one right after the other, and others stay.

    Yields:
      An empty folder to write the files to. After an error it is gone, and what had
      the name is as it was.
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
        is_locked(handle)
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
    """Writes a UTF-8 file: all of it, or nothing.

    Args:
      path: the file, there or not.
      text: what it is to hold.

    Raises:
      OSError: if it can't be written; what was there is as it was.
    """
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Adds to a UTF-8 file, which must not be a link.

    Args:
      path: the file; made if absent.
      text: what to add.

    Raises:
      OSError: if it is a link, or can't be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)


def is_leftover(name: str) -> bool:
    """Says whether a file's name is that of a temporary one.

    Args:
      name: of a file or folder, without its parents.

    Returns:
      True for such a name.
    """
    return _LEFTOVER.fullmatch(name) is not None


def _remove_leftovers(folder: Path, name: str) -> None:
    """Removes what killed processes left of writing ``name``: nobody locks it."""
    for entry in folder.glob(f".{_escaped(name)}.*{SUFFIX}"):
        found = _LEFTOVER.fullmatch(entry.name)
        if found is None or found[1] != name or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):
            handle = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if is_locked(handle):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _umask() -> int:
    """Returns the process's mask; there is no way to read it without setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems can't, for folders
            raise
    finally:
        os.close(handle)
