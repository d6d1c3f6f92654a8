"""Files appear whole, under links that strangers planted and through kills."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from lora_jax.files import atomic
from lora_jax.files.lock import Lock, LockedError

WAITS = """
import pathlib, sys, time
from lora_jax.files import atomic
from lora_jax.files.lock import Lock
target = pathlib.Path(sys.argv[2])
if sys.argv[1] == "lock":
    mine = Lock(target)
else:
    manager = getattr(atomic, sys.argv[1])(target)
    new = manager.__enter__()
    (new / "a" if new.is_dir() else new).write_text("half")
print("ready", flush=True)
time.sleep(600)
"""


def started(what, target):
    """A process that is in the middle of writing, or holds a lock."""
    command = [sys.executable, "-c", WAITS, what, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in ("file", ".file.tmp", ".file.new"):
        (tmp_path / name).symlink_to(outside)
    atomic.write_text(tmp_path / "file", "mine")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "mine"
    assert outside.read_text() == "precious"
    (tmp_path / "log").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        atomic.append_text(tmp_path / "log", "more")
    assert outside.read_text() == "precious"


def test_temporary_names_are_new_each_time(tmp_path):
    seen = set()
    for _ in range(20):
        with atomic.new_file(tmp_path / "file") as new:
            seen.add(new.name)
            assert atomic.is_leftover(new.name)
            assert new.stat().st_mode & 0o777 == 0o600
    assert len(seen) == 20
    assert names(tmp_path) == ["file"]
    assert not atomic.is_leftover("file")


def test_a_file_that_fails_stays_as_it_was(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail():
        raise RuntimeError

    with contextlib.suppress(RuntimeError), atomic.new_file(file) as new:
        new.write_text("half")
        fail()
    with contextlib.suppress(RuntimeError), atomic.new_folder(tmp_path) as new:
        (new / "file").write_text("half")
        fail()
    assert names(tmp_path) == ["file"]
    assert file.read_text() == "old"


def test_files_have_the_rights_of_others(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "file", "")
        with atomic.new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_bytes_and_names_are_on_the_disk_before_and_after_the_rename(
    tmp_path, monkeypatch
):
    calls = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def watch_replace(old, new):
        calls.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    atomic.write_text(tmp_path / "file", "text")
    assert [atomic.is_leftover(name) or name for name in calls] == [
        True,
        "replace",
        tmp_path.name,
    ]


def test_a_folder_appears_whole_or_gets_all_files(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic.new_folder(target) as new:
        (new / "x").write_text("1")
        assert not target.exists()
    assert names(target) == ["x"]
    (target / "y").write_text("kept")
    with atomic.new_folder(target) as new:
        (new / "x").write_text("2")
        assert (target / "x").read_text() == "1"
    assert names(target) == ["x", "y"]
    assert (target / "x").read_text() == "2"
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("what", ["new_file", "new_folder"])
def test_what_a_kill_leaves_goes_with_the_next_write(tmp_path, what):
    target = tmp_path / "a[b]*"
    process = started(what, target)
    [left] = names(tmp_path)
    assert atomic.is_leftover(left)
    with getattr(atomic, what)(target):
        assert left in names(tmp_path)  # the other process is at it still
    end(process)
    with getattr(atomic, what)(target):
        assert left not in names(tmp_path)
    assert names(tmp_path) == [target.name]


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    process = started("lock", tmp_path / "lock")
    with pytest.raises(LockedError, match=rf"held by process {process.pid} on '\S+'"):
        Lock(tmp_path / "lock")
    end(process)
    mine = Lock(tmp_path / "lock")
    assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
    with pytest.raises(LockedError, match=f"held by process {os.getpid()} on"):
        Lock(tmp_path / "lock")
    mine.release()
    Lock(tmp_path / "lock").release()
    assert not (tmp_path / "lock").exists()


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic link"):
        Lock(tmp_path / "lock")
    assert not (tmp_path / "outside").exists()
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("[]")  # whatever a stranger left
    Lock(tmp_path / "lock").release()
