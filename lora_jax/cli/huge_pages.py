"""2 MiB memory pages, for faster steps on a CPU.

XLA allocates a program's temporaries on each call and frees them afterwards, so Linux
zeroes and maps them again each time in 4 KiB pages: 140,000 page faults for a step of
MiniLM on 16 rows of 128 tokens. glibc's malloc can request 2 MiB pages, but only if
configured at process start, hence the restart. It pays off: a step takes 0.82 of the
time (``python -m benchmarks huge_pages``).

References:
  https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html,
  ``glibc.malloc.hugetlb``, since glibc 2.35.
"""

import ctypes
import os
import sys
from pathlib import Path

TUNABLES, HUGETLB = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Of glibc's malloc.h: never a mapping of its own for a large block, never return the
# end of the heap, one heap for all threads (others are limited to 64 MiB).
_KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "ARENAS": (-8, 1)}


def enable() -> None:
    """Restarts this process with huge pages, if that has an effect.

    Call it first in the program. It does nothing if the system is not Linux, enables
    huge pages always or never, or ``GLIBC_TUNABLES`` already configures them: opt out
    with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0``.
    """
    tunables = os.environ.get(TUNABLES, "")
    if HUGETLB in tunables or not _is_opt_in() or not sys.executable:
        return
    os.environ[TUNABLES] = ":".join(filter(None, (tunables, f"{HUGETLB}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed() -> None:
    """Keeps freed memory for the next call, with its pages; call it before using JAX.

    A step of 8 runs side by side has temporaries of hundreds of MB, whose pages Linux
    zeroes again at each step, huge or not: a fifth of its processor time for MiniLM on
    4 rows of 32 tokens each. The process then holds as much memory as it ever needed.
    It does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in _KEEP.values():
            libc.mallopt(option, value)


def _is_opt_in() -> bool:
    try:
        return "[madvise]" in _SYSTEM.read_text()
    except OSError:
        return False
