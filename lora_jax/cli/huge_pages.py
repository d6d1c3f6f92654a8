"""Memory in pages of 2 MiB, for steps on a CPU.

XLA takes a program's temporaries from the system at each call, and gives them back
after it. Linux then hands them out anew, zeroed, a page of 4 KiB at a time: 140,000 of
them for a step of MiniLM on 16 rows of 128 tokens. Pages of 2 MiB are asked for by
glibc's malloc, if told to when the process starts: hence a new start, which the step
repays: it takes 0.82 of the time (``python -m benchmarks huge_pages``).

References:
  https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html,
  ``glibc.malloc.hugetlb``, since glibc 2.35.
"""

import os
import sys
from pathlib import Path

TUNABLES, HUGETLB = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Starts this process anew, with huge pages, where that changes anything.

    To be called before anything is done. Nothing happens where the system gives huge
    pages to all or to nobody, is no Linux, or ``GLIBC_TUNABLES`` has a word on them:
    ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` is how to do without.
    """
    told = os.environ.get(TUNABLES, "")
    if HUGETLB in told or not _is_for_who_asks() or not sys.executable:
        return
    os.environ[TUNABLES] = ":".join(filter(None, (told, f"{HUGETLB}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_for_who_asks() -> bool:
    try:
        return "[madvise]" in _SYSTEM.read_text()
    except OSError:
        return False
