"""Source archives come from where pip is configured to look, and nothing in them runs.

The indexes are folders, and a server on this machine: no test here uses a network.
"""

import base64
import http.server
import json
import subprocess
import threading

import pytest

from experiments import index
from experiments.index import JSON_TYPE, fetch_source, pip_config, places

FILE = "demo_data-1.0.tar.gz"
REQUIREMENT = "Demo.Data==1.0"


@pytest.fixture
def configured(monkeypatch):
    """Sets what ``pip config list`` prints."""

    def configure(*lines, returncode=0, stderr=""):
        done = subprocess.CompletedProcess([], returncode, "\n".join(lines), stderr)
        monkeypatch.setattr(index.subprocess, "run", lambda *_, **__: done)

    return configure


@pytest.fixture
def server():
    """A server of ``pages``; ``seen`` holds the headers that it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, dict(self.headers)))
            kind, content = self.server.pages.get(self.path, (None, b""))
            self.send_response(200 if kind else 404)
            self.send_header("Content-Type", kind or "text/plain")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.pages, served.seen = {}, []
        served.url = f"http://127.0.0.1:{served.server_port}"
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def test_options_of_pip_are_ranked_as_pip_ranks_them(configured):
    configured(
        ":env:.index-url='https://env'",
        "global.index-url='https://global'",
        "global.timeout='5'",
        "download.timeout='7'",
        "install.timeout='9'",
        "global.find-links='/a\\n/b'",
    )
    config = pip_config()
    assert config == {
        "index-url": "https://env",
        "timeout": "7",
        "find-links": "/a\n/b",
    }
    assert places(config, "X.y_z") == ["/a", "/b", "https://env/x-y-z/"]


def test_without_an_index_only_links_are_looked_at():
    config = {"no-index": "true", "find-links": "/a", "extra-index-url": "https://x"}
    assert places(config, "demo") == ["/a"]


def test_a_folder_of_files_and_an_index_in_a_folder(configured, tmp_path):
    page = tmp_path / "simple" / "demo-data"
    page.mkdir(parents=True)
    (page / "index.html").write_text(
        f'<a href="../../files/demo_data-0.9.tar.gz">0.9</a> <a name="x">x</a>'
        f'<a href="../../files/{FILE}#sha256=ab">1.0</a>'
    )
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / FILE).write_bytes(b"the archive")
    simple = (tmp_path / "simple").as_uri()
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, options in {
        "index": [f"global.index-url={simple!r}", f"global.find-links='{empty}'"],
        "links": ["global.no-index='1'", f"global.find-links='{tmp_path}/files'"],
    }.items():
        configured(*options)
        (tmp_path / name).mkdir()
        found = fetch_source(REQUIREMENT, tmp_path / name)
        assert found == tmp_path / name / FILE
        assert found.read_bytes() == b"the archive"


@pytest.mark.parametrize("kind", ["text/html", JSON_TYPE])
def test_both_kinds_of_pages_are_read(configured, server, tmp_path, kind):
    link = f"../files/{FILE}"
    pages = {
        "text/html": f'<a href="{link}">x</a>',
        JSON_TYPE: json.dumps({"files": [{"url": link}]}),
    }
    server.pages["/demo-data/"] = (kind, pages[kind].encode())
    server.pages[f"/files/{FILE}"] = ("application/x-tar", b"the archive")
    configured(f"global.index-url='{server.url.replace('//', '//me:a%40b@')}'")
    assert fetch_source(REQUIREMENT, tmp_path).read_bytes() == b"the archive"
    (_, asked), (_, fetched) = server.seen
    assert asked["Authorization"] == f"Basic {base64.b64encode(b'me:a@b').decode()}"
    assert fetched["Authorization"] == asked["Authorization"]  # of the same host


def test_every_place_says_why_it_has_no_such_file(configured, server, tmp_path):
    secret = tmp_path / FILE
    secret.write_bytes(b"of this machine")
    page = f'<a href="{secret.as_uri()}">a page may not point at our own files</a>'
    server.pages["/a/demo-data/"] = ("text/html", page.encode())
    server.pages["/b/demo-data/"] = (JSON_TYPE, b"{")
    base = server.url.replace("//", "//me:secret@")
    configured(
        f"global.index-url='{base}/a'",
        f"global.extra-index-url='{base}/b {base}/c {tmp_path.as_uri()}/none'",
    )
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(OSError, match=r"/a/demo-data/: no source archive") as error:
        fetch_source(REQUIREMENT, target)
    text = str(error.value)
    assert "/b/demo-data/: Expecting property name" in text
    assert "/c/demo-data/: HTTP Error 404" in text
    assert "none/demo-data/: <urlopen error" in text
    assert "secret" not in text
    assert list(target.iterdir()) == []


def test_no_pip_and_no_index_are_named(configured, tmp_path):
    configured(returncode=1, stderr="No module named pip")
    with pytest.raises(OSError, match=r"failed: No module named pip"):
        fetch_source(REQUIREMENT, tmp_path)
    configured("global.no-index='true'")
    with pytest.raises(OSError, match=r"configured with no index at all"):
        fetch_source(REQUIREMENT, tmp_path)
