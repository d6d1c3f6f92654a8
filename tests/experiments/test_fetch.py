"""Packages are fetched through pip, checked, and unpacked inside their own folder.

pip is replaced by a function that writes an archive: no test here uses a network.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest

from experiments import fetch
from experiments.fetch import FetchError, fetch_package, unpack


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as pack:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
                pack.addfile(info)
            else:
                info.size = len(content)
                pack.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index that serves demo==1.0; holds its sha256 and pip's command lines."""
    wheel = write_zip(tmp_path / "demo-1.0-py3-none-any.whl", {"demo/model/f": "hi"})
    served = types.SimpleNamespace(
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        commands=[],
        stdout="",
        failure=None,
    )

    def run(command, **_):
        served.commands.append(command)
        if served.failure:
            return subprocess.CompletedProcess(command, 1, "", served.failure)
        if "-d" not in command:
            return subprocess.CompletedProcess(command, 0, served.stdout, "")
        folder = fetch.Path(command[command.index("-d") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return served


def test_a_package_is_fetched_once_and_kept(index, tmp_path):
    folder = fetch_package("demo==1.0", sha256=index.sha256)
    assert (folder / "demo/model/f").read_text() == "hi"
    assert folder.parent == tmp_path / "cache"
    assert fetch_package("demo==1.0", sha256=index.sha256) == folder
    assert len(index.commands) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_pip_gets_the_hash_and_no_host(index):
    fetch_package("demo==1.0", sha256=index.sha256)
    (command,) = index.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert not any("://" in word for word in command)


def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(index, tmp_path):
    with pytest.raises(FetchError, match=rf"sha256 {'0' * 64}; got {index.sha256}"):
        fetch_package("demo==1.0", sha256="0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline_the_error_says_what_was_wanted_and_what_pip_said(index):
    index.failure = "WARNING: x\nERROR: No matching distribution found for demo==1.0\n"
    with pytest.raises(FetchError, match=r"demo==1.0 .*could not be down") as error:
        fetch_package("demo==1.0", sha256=index.sha256)
    assert "No matching distribution found" in str(error.value)
    assert "WARNING" not in str(error.value)


def test_a_source_archive_is_never_handed_to_pip(index, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    content = {"demo-1.0/setup.py": b"raise SystemExit", "demo-1.0/data": b"hi"}
    archive = write_tar(wheels / "demo-1.0.tar.gz", content)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.PINS, "demo==1.0", fetch.Pin(sha256, 0.1, True))
    index.stdout = f"global.find-links={str(wheels)!r}\nglobal.no-index='true'\n"
    folder = fetch_package("demo==1.0")
    assert (folder / "demo-1.0/data").read_text() == "hi"
    assert [command[2:] for command in index.commands] == [["pip", "config", "list"]]
    with pytest.raises(FetchError, match=rf"sha256 {'0' * 64}; got {sha256}"):
        fetch_package("demo==1.0", sha256="0" * 64)
    archive.unlink()
    with pytest.raises(
        FetchError, match=r"PIP_FIND_LINKS(.|\n)*wheels: no source arch"
    ):
        fetch_package("demo==1.0", sha256="0" * 64)


def test_a_cache_that_cant_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match=r"file/cache.*LORA_JAX_CACHE"):
        fetch_package("demo==1.0", sha256=index.sha256)


def test_only_exact_pinned_requirements_are_taken(index):
    with pytest.raises(ValueError, match=r"NAME==VERSION; got 'demo'"):
        fetch_package("demo")
    with pytest.raises(ValueError, match=r"NAME==VERSION; got '--index-url=x==1'"):
        fetch_package("--index-url=x==1")
    with pytest.raises(ValueError, match=r"demo==1.0 must have a known sha256"):
        fetch_package("demo==1.0")
    assert index.commands == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x"])
def test_a_wheel_that_climbs_out_is_refused(tmp_path, name):
    archive = write_zip(tmp_path / "w.whl", {name: "x"})
    with pytest.raises(FetchError, match=r"w.whl must stay in its folder"):
        unpack(archive, tmp_path / "in" / "to")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "in" / "x").exists()


@pytest.mark.parametrize(
    "members",
    [{"../x": b"x"}, {"link": None}, {"link": None, "link/x": b"x"}],
    ids=["dots", "link", "through_link"],
)
def test_a_source_archive_that_climbs_out_is_refused(tmp_path, members):
    archive = write_tar(tmp_path / "s.tar.gz", members)
    with pytest.raises(FetchError, match=r"s.tar.gz can't be unpacked"):
        unpack(archive, tmp_path / "in")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["w.whl", "s.tar.gz"])
def test_a_file_that_is_not_an_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive")
    with pytest.raises(FetchError, match=rf"{name} can't be unpacked"):
        unpack(tmp_path / name, tmp_path / "in")


def damaged_zip(path, method, change):
    with zipfile.ZipFile(path, "w", method) as pack:
        pack.writestr("f", bytes(range(256)) * 40)
    data = bytearray(path.read_bytes())
    start = 30 + 1  # after the local header and the name
    change(data, start)
    path.write_bytes(data)


def break_stream(data, start):
    data[start : start + 24] = b"\xff" * 24


def of_no_method(data, _):
    at = data.rindex(b"PK\x01\x02")
    data[8:10] = data[at + 10 : at + 12] = (99).to_bytes(2, "little")


def encrypt(data, _):
    at = data.rindex(b"PK\x01\x02")
    data[6] |= 1
    data[at + 8] |= 1


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (zipfile.ZIP_DEFLATED, break_stream),
        (zipfile.ZIP_LZMA, break_stream),
        (zipfile.ZIP_STORED, of_no_method),
        (zipfile.ZIP_STORED, encrypt),
    ],
    ids=["zlib", "lzma", "method", "encrypted"],
)
def test_a_damaged_wheel_is_named(tmp_path, method, change):
    damaged_zip(tmp_path / "w.whl", method, change)
    with pytest.raises(FetchError, match=r"w\.whl can't be unpacked: "):
        unpack(tmp_path / "w.whl", tmp_path / "in")


def test_a_damaged_source_archive_is_named(tmp_path):
    archive = write_tar(tmp_path / "s.tar.gz", {"f": bytes(range(256)) * 99})
    data = bytearray(archive.read_bytes())
    data[20:60] = b"\xff" * 40
    archive.write_bytes(data)
    with pytest.raises(FetchError, match=r"s\.tar\.gz can't be unpacked: "):
        unpack(archive, tmp_path / "in")
