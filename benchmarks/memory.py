"""Measuring this process's peak resident memory.

Counts only anonymous memory (``RssAnon``): the system can drop the pages of a
memory-mapped file at any time.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path


def anonymous_bytes() -> int:
    """Returns the anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux.")


@contextlib.contextmanager
def peak_watched() -> Iterator[list[int]]:
    """Samples the memory every millisecond while its body runs.

    Yields:
      A list that contains the peak afterwards.
    """
    found, is_done = [0], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            found[0] = max(found[0], anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_done.set()
        watcher.join()
