"""Multi-process jobs on `jax.distributed`: starting, synchronising and shutting down.

Each process runs the same program on its own devices. Collectives synchronise what they
must agree on: that all have read their files without errors, that all have the same
settings, when to stop. With a single process these functions are no-ops.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

START_SECONDS = 300  # timeout for all processes to start
SHUTDOWN_SECONDS = 60  # timeout for all processes to shut down
# Errors that JAX raises in the other processes' collectives when a process dies.
_LOST = re.compile(
    r"Gloo|NCCL|Connection (closed|reset) by peer|coordination service"
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): "
)


class PeerError(RuntimeError):
    """Another process failed, so this one can't continue."""


def start(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int = START_SECONDS,
) -> None:
    """Joins a multi-process job; call it before using any device.

    Args:
      coordinator: ``"HOST:PORT"`` where process 0 listens; the same in all processes.
      count: number of processes.
      index: index of this process, from 0. If all three are None, JAX detects the
        cluster: SLURM, Kubernetes, Open MPI or a TPU pod.
      timeout: seconds to wait for the other processes.

    Raises:
      ValueError: if only some of the three are given or one is out of range; or if no
        cluster is detected.
      TimeoutError: if the coordinator's address does not accept connections.
      OSError: if process 0 can't listen there.

    Example:
      >>> start("localhost:1234", count=2, index=2)
      Traceback (most recent call last):
      ...
      ValueError: index must be from 0 to 1 for 2 processes; got 2.
    """
    given = {"coordinator": coordinator, "count": count, "index": index}
    if all(value is None for value in given.values()):
        _initialize(timeout)
        return
    if coordinator is None or count is None or index is None:
        missing = [name for name, value in given.items() if value is None]
        raise ValueError(
            f"coordinator, count and index must be given together; got no "
            f"{' and no '.join(missing)}."
        )
    if count < 1 or not 0 <= index < count:
        last = max(count, 1) - 1
        raise ValueError(
            f"index must be from 0 to {last} for {count} processes; got {index}."
        )
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            "coordinator must be HOST:PORT, with a port from 1 to 65535; got "
            f"{coordinator!r}."
        )
    if index == 0:
        _check_free(int(port))
    else:
        _wait_for(host.strip("[]"), int(port), timeout, index)
    # "deactivate": don't detect a cluster.
    _initialize(timeout, coordinator, count, index, None, "deactivate")


def _initialize(timeout: int, *args: Any) -> None:
    try:
        jax.distributed.initialize(
            *args,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"no supported cluster was detected ({error}). JAX supports SLURM, Open "
            "MPI, TPU pods and Kubernetes; elsewhere pass the coordinator's address, "
            "the number of processes and the process index."
        ) from error


def _check_free(port: int) -> None:
    """Raises unless process 0 can listen on the port."""
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise OSError(
            f"process 0 can't listen on port {port}: {error.strerror}. Choose another "
            "port for all processes."
        ) from error


def _wait_for(host: str, port: int, timeout: int, index: int) -> None:
    """Waits until process 0 listens; JAX's own wait aborts instead of raising."""
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(timeout, 5)):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process {index} could not reach the coordinator at {host}:{port} "
                    f"within {timeout} s ({error}). Check that process 0 is running on "
                    "that host with that port, and reachable from here."
                ) from error
        time.sleep(0.2)


def is_job() -> bool:
    """Returns whether this is one of several processes that are still connected."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Blocks until all processes reach the barrier of this name."""
    if is_job():
        multihost_utils.sync_global_devices(name)


def is_any(flag: bool) -> bool:
    """Returns whether a flag is set in any process; all processes must call it."""
    if not is_job():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(value: Any) -> Any:
    """Broadcasts process 0's JSON value to all processes; all of them must call it.

    Example:
      >>> from_first({"step": 3})
      {'step': 3}
    """
    if not is_job():
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    padded = np.frombuffer(text.ljust(size, b" ")[:size], np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def check_same(name: str, value: Any) -> None:
    """Raises unless a JSON value is the same in all processes, which must all call it.

    Raises:
      ValueError: listing the processes whose value differs from process 0's.
    """
    if not is_job():
        return
    text = json.dumps(value, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    all_digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((all_digests != all_digests[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(
            f"{name} must be the same in all {jax.process_count()} processes; it "
            f"differs between 0 and {', '.join(map(str, others))}. Run all of them "
            "with the same command, files and versions."
        )


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Makes an error in a block of any process fail the block in all processes.

    The block itself must not synchronise with other processes. After an error the job
    is shut down cleanly, while all processes are still alive.

    Raises:
      PeerError: in a process without an error, if another process had one.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if is_job():
        faults = multihost_utils.process_allgather(np.array(fault is not None))
        numbers = ", ".join(map(str, np.flatnonzero(faults)))
        if faults.any():
            index = jax.process_index()
            jax.distributed.shutdown()
            if fault is None:
                raise PeerError(
                    f"process {index} stops because process {numbers} could not start; "
                    "see its error message."
                )
    if fault is not None:
        raise fault


def shut_down() -> None:
    """Shuts the job down cleanly, after waiting for all processes."""
    if is_job():
        jax.distributed.shutdown()


def is_lost_peer(error: BaseException | None) -> bool:
    """Returns whether an error was caused by losing another process."""
    while error is not None:
        if _LOST.search(str(error)):
            return is_job()
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> None:
    """Exits a process of a job immediately with status ``code``; a no-op without a job.

    JAX's own exit handler waits for the other processes, which may be gone.
    """
    if is_job():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
