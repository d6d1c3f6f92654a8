import os
import subprocess
import sys

import pytest

from lora_jax.cli import huge_pages

MADVISE, ALWAYS, NEVER = "always [madvise] never", "[always] madvise never", "[never]"
SHOW = """
import os, sys
from lora_jax.cli import huge_pages
huge_pages._is_opt_in = lambda: True
huge_pages.enable()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.utf8_mode, os.getpid())
"""


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """Calls `ask` on a machine that is told, and returns what it would start."""

    def ask(system, told=None):
        file, started = tmp_path / "enabled", []
        if system is not None:
            file.write_text(system + "\n")
        monkeypatch.setattr(huge_pages, "_SYSTEM", file)
        monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if told is not None:
            monkeypatch.setenv("GLIBC_TUNABLES", told)
        huge_pages.enable()
        return started, os.environ.get("GLIBC_TUNABLES")

    return ask


def test_malloc_is_told_where_the_system_gives_huge_pages_to_who_asks(starts):
    started, told = starts(MADVISE)
    assert told == "glibc.malloc.hugetlb=1"
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


def test_other_tunables_are_kept(starts):
    _, told = starts(MADVISE, "glibc.malloc.arena_max=2")
    assert told == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("system", "told"),
    [
        pytest.param(ALWAYS, None, id="all get them"),
        pytest.param(NEVER, None, id="nobody gets them"),
        pytest.param(None, None, id="no Linux"),
        pytest.param(MADVISE, "glibc.malloc.hugetlb=0", id="the user wants none"),
        pytest.param(MADVISE, "glibc.malloc.hugetlb=1", id="started anew already"),
    ],
)
def test_else_nothing_is_started(starts, system, told):
    assert starts(system, told) == ([], told)


def test_the_process_is_the_same_one_with_its_words_and_options():
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    words = [sys.executable, "-X", "utf8", "-c", SHOW, "train", "a b"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        shown, _ = process.communicate()
    wanted = f"glibc.malloc.hugetlb=1 ['train', 'a b'] 1 {process.pid}\n"
    assert shown == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_for_the_next_call():
    code = (
        "import resource, numpy as np; from lora_jax.cli import huge_pages\n"
        "huge_pages.keep_freed()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "np.ones(10_000_000); before = faults(); np.ones(10_000_000)\n"
        "print(faults() - before)"
    )
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    run = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1000  # of 19,532 pages
