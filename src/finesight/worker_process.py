"""Template and worker processes of a `finesight.worker_pool.WorkerPool`.

`main` is the template process of a pool. It loads the shared state once, stays single-threaded, and
forks a worker for each connection that the pool sends. A worker runs one job after another. Each
job has a limit of CPU time, which the kernel enforces. The kernel also kills a worker when the pool
closes its connection, and when the process of the pool ends.

Requests are pickled, since only the pool sends them. Replies are JSON and raw arrays: a file that a
worker decodes may compromise it, and unpickling its reply could execute code.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import pickle
import resource
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError

FORK_MESSAGE = struct.Struct("!QI")
"""Message that requests a worker: memory limit in bytes beyond the template, and nice level."""

_COUNT = struct.Struct("!I")
_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class JobOutput:
    """Result of a job in a worker: JSON value and NumPy arrays."""

    value: Any = None
    arrays: Sequence[NDArray[np.generic]] = field(default=())


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """Job for a worker: function of shared state and `args`, with time limits."""

    function: Callable[..., JobOutput]
    args: tuple[Any, ...]
    cpu_seconds: float
    wall_seconds: float


def write_frame(connection: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    """Send a message that consists of several byte strings."""
    lengths = b"".join(_LENGTH.pack(len(part)) for part in parts)
    connection.sendall(_COUNT.pack(len(parts)) + lengths)
    for part in parts:
        connection.sendall(part)


def read_frame(connection: socket.socket, max_bytes: int | None = None) -> list[bytearray]:
    """Receive a message sent by `write_frame`, and return its parts.

    Raises EOFError if it has more than `max_bytes` bytes, or if the connection is closed.
    """
    (count,) = _COUNT.unpack(_read(connection, _COUNT.size))
    if max_bytes is not None and count * _LENGTH.size > max_bytes:
        raise EOFError(f"a message of {count} parts")
    lengths = [length for (length,) in _LENGTH.iter_unpack(_read(connection, count * _LENGTH.size))]
    if max_bytes is not None and sum(lengths) > max_bytes:
        raise EOFError(f"a message of {sum(lengths)} bytes")
    return [_read(connection, length) for length in lengths]


def _read(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return data


def as_byte_view(array: NDArray[np.generic]) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    flat: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return flat


def main(number: int) -> None:
    """Run the template process: load the shared state, then fork a worker for each connection.

    Args:
        number: File descriptor of the control connection. The process ends when the pool closes it.
    """
    control = socket.socket(fileno=number)
    # Ctrl-C reaches every process of the terminal; the pool ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers that have ended are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        setup, args = pickle.loads(read_frame(control)[0])
        state: list[Any] = []

        def load() -> JobOutput:
            state.append(setup(*args))
            return JobOutput()

        reply, _ = _outcome(load)
        write_frame(control, [json.dumps(reply).encode()])
        gc.collect()
        gc.freeze()
        while state:
            data, handles, _, _ = socket.recv_fds(control, FORK_MESSAGE.size, 1)
            if not data:
                return
            memory_bytes, nice = FORK_MESSAGE.unpack(data)
            if os.fork() == 0:
                control.close()
                _run_worker(socket.socket(fileno=handles[0]), state[0], memory_bytes, nice)
            os.close(handles[0])


def _run_worker(connection: socket.socket, state: Any, memory_bytes: int, nice: int) -> None:
    """Run the jobs that the pool sends until it closes the connection.

    Ends the process and never returns.
    """
    status = 1
    try:
        _apply_limits(memory_bytes, nice)
        _signal_hangup(connection)
        base = _resident_bytes()
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                payload, *buffers = read_frame(connection)
                job: WorkerJob = pickle.loads(payload, buffers=buffers)
                start_time = time.process_time()
                reply = _run_job(job, state, connection)
                meta = reply[0] | {
                    "cpu_seconds": time.process_time() - start_time,
                    "rss_increase": _resident_bytes() - base,
                }
                write_frame(connection, [json.dumps(meta).encode(), *map(as_byte_view, reply[1])])
        status = 0
    finally:
        os._exit(status)


def _signal_hangup(connection: socket.socket) -> None:
    """Request a SIGIO signal when the pool closes the connection or sends data."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    number = connection.fileno()
    fcntl.fcntl(number, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_ASYNC)


def _check_open(connection: socket.socket) -> None:
    """Raise EOFError if the pool has closed the connection."""
    with contextlib.suppress(BlockingIOError):
        if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            raise EOFError


def _run_job(
    job: WorkerJob, state: Any, connection: socket.socket
) -> tuple[dict[str, Any], Sequence[NDArray[np.generic]]]:
    """Run a job, and return the reply.

    The kernel kills this process if the job exceeds a time limit or is canceled.
    """
    signal.setitimer(signal.ITIMER_PROF, job.cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, job.wall_seconds)
    # The pool sends no data while a job runs: SIGIO means that it has closed the connection.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    try:
        _check_open(connection)
        return _outcome(lambda: job.function(state, *job.args))
    finally:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _outcome(
    function: Callable[[], JobOutput],
) -> tuple[dict[str, Any], Sequence[NDArray[np.generic]]]:
    """Call a function, and return its output or error as a reply."""
    try:
        output = function()
    except UserError as error:
        words = [error.what, error.where, error.expected, error.remedy]
        return {"user_error": words}, ()
    except MemoryError:
        return {"out_of_memory": True}, ()
    except Exception as error:
        # Its message may quote what a client sent.
        frames = traceback.format_tb(error.__traceback__)
        return {"fault": [type(error).__name__, "".join(frames)]}, ()
    kinds = [[array.dtype.str, array.shape] for array in output.arrays]
    return {"value": output.value, "arrays": kinds}, output.arrays


def _apply_limits(memory_bytes: int, nice: int) -> None:
    """Set CPU priority and memory limit of this worker, and discard its output.

    Native code may print untrusted input.
    """
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)
    if devnull > 2:
        os.close(devnull)
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        # Out of memory, the kernel kills a worker before the server.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        limit = _read_statm(0) + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _resident_bytes() -> int:
    try:
        return _read_statm(1)
    except OSError:  # no /proc on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _read_statm(column: int) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[column]) * resource.getpagesize()
