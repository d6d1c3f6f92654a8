"""Several processes as one job, on `jax.distributed`: they start, agree and end as one.

Each process runs the same program on its own devices. What they must agree on (that
all read their files without a fault, that all have the same settings, when to stop) is
told to all by collectives on the devices; a process alone agrees with itself at once.
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

START_SECONDS = 300  # that the processes wait for each other at the start
SHUTDOWN_SECONDS = 60  # and at the end
# How JAX words what happens to the others' collectives when a process dies.
_LOST = re.compile(
    r"Gloo|NCCL|Connection (closed|reset) by peer|coordination service"
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): "
)


class PeerError(RuntimeError):
    """Another process failed, so that this one can't go on."""


def start(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int = START_SECONDS,
) -> None:
    """Joins the processes of a job; to be called before anything touches a device.

    Args:
      coordinator: ``"HOST:PORT"`` at which process 0 is to listen; the same in all.
      count: how many processes there are.
      index: the number of this one, from 0. With all three None, JAX asks the cluster:
        SLURM, Kubernetes, Open MPI or a TPU pod.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: if only some of the three are given or one is out of range; if there
        is no cluster to ask.
      TimeoutError: if nobody listens at the coordinator's address.
      OSError: if process 0 can't listen there.

    Example:
      >>> start("localhost:1234", count=2, index=2)
      Traceback (most recent call last):
      ...
      ValueError: process 2 can't be one of 2: they are numbered 0 to 1.
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
            f"process {index} can't be one of {count}: they are numbered 0 to {last}."
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
    # "deactivate": all is said, so no cluster is asked.
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
            f"no cluster was found that says which processes there are ({error}). "
            "JAX knows SLURM, Open MPI, TPU pods and Kubernetes; elsewhere give each "
            "process the coordinator's address, their number and its own."
        ) from error


def _check_free(port: int) -> None:
    """Raises unless process 0 can listen."""
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise OSError(
            f"process 0 can't listen on port {port}: {error.strerror}. Choose another "
            "port, the same for all processes."
        ) from error


def _wait_for(host: str, port: int, timeout: int, index: int) -> None:
    """Waits until process 0 listens: JAX's own wait ends in an abort, not an error."""
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(timeout, 5)):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process {index} waited {timeout} s for the coordinator at "
                    f"{host}:{port}, and nobody listens there ({error}). Is process 0 "
                    "running on that host, with that port, and open to this one?"
                ) from error
        time.sleep(0.2)


def is_job() -> bool:
    """Whether this is one of several processes, all of them there still."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the place, the same in all.
    """
    if is_job():
        multihost_utils.sync_global_devices(name)


def is_any(flag: bool) -> bool:
    """Whether a flag is set in any process; all processes have to ask."""
    if not is_job():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(value: Any) -> Any:
    """Returns process 0's value in all processes; they all have to ask.

    Args:
      value: JSON values; only process 0's counts.

    Returns:
      Process 0's value.

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
    """Raises unless a value is the same in all processes; they all have to ask.

    Args:
      name: of the value, for the error.
      value: JSON values.

    Raises:
      ValueError: naming the processes that have another value than process 0.
    """
    if not is_job():
        return
    text = json.dumps(value, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    all_digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((all_digests != all_digests[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(
            f"{name} must be the same in all {jax.process_count()} processes; that of "
            f"{', '.join(map(str, others))} is not that of 0. Give all of them the "
            "same command, files and versions."
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends a block with its error in the processes that had one, in all the others too.

    The block must not wait for other processes by itself. The job is over after an
    error: it is shut down in good order, while all of them are there.

    Yields:
      Nothing.

    Raises:
      PeerError: in a process that had no error, where another one had.
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
                    f"process {index} stops, for process {numbers} could not start; "
                    "its message says why."
                )
    if fault is not None:
        raise fault


def shut_down() -> None:
    """Ends a job in good order: waits for all processes to come here."""
    if is_job():
        jax.distributed.shutdown()


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone."""
    while error is not None:
        if _LOST.search(str(error)):
            return is_job()
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> None:
    """Ends a process of a job at once; does nothing where there is no job.

    JAX's own exit waits for the other processes, which may be gone.

    Args:
      code: exit status.
    """
    if is_job():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
