"""Worker processes for input from strangers: killed at their limits, and replaced.

A pool has one template process, started once, that loads what jobs need and forks the workers (see
`finesight.worker_process`). A worker that hangs, grows or crashes takes nothing else with it: its
job fails with a `WorkerLimitError`, and the template forks the next worker in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.worker_process import FORK, Job, Output, read_frame, write_frame

NICE = 10
"""Scheduling priority of workers, below the process that started them."""

WALL_FACTOR = 15
"""Limit of wall-clock time over that of processor time: workers may have to wait for a core."""

MAX_JOBS = 500
MAX_GROWN_BYTES = 32 << 20
"""A worker is replaced after so many jobs, or when it has kept so much memory."""

SETUP_SECONDS = 120.0

_TEMPLATE = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from finesight.worker_process import main
main(int(sys.argv[1]))
"""
"""Program of the template: modules are found where this process finds them."""

_INHERITED = ("PATH", "HOME", "LANG", "LC_", "LD_", "DYLD_", "PYTHON", "TMPDIR", "TZ")
"""How variables begin that the template inherits: keys and tokens stay with this process."""

_ENVIRONMENT = {
    # A process with threads must not fork.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}


class WorkerLimitError(UserError):
    """A job went over a limit and was stopped, or crashed."""


class WorkerLostError(Exception):
    """A worker ended because its pool was closed or its job was cancelled."""


class WorkerFault(Exception):
    """A job raised an error of our own. `frames` is its traceback, without the message."""

    def __init__(self, kind: str, frames: str) -> None:
        super().__init__(kind)
        self.kind, self.frames = kind, frames


@dataclass(frozen=True, slots=True)
class Reply:
    """Result of a job: the value and arrays of its `Output`, and the processor time it took."""

    value: Any
    arrays: tuple[NDArray[np.generic], ...]
    cpu_seconds: float


class Worker:
    """A worker process as the pool sees it. `call` runs a job; `start`, `ready` and `finish` do so
    without waiting.

    One thread uses a worker at a time, but any thread may `kill` it. As a context manager, it is
    closed in the end.
    """

    def __init__(self, pool: WorkerPool, connection: socket.socket) -> None:
        self._pool, self._connection = pool, connection
        self.killed = self._pending = False
        self._cpu_seconds = 0.0
        self.jobs = 0
        self.grown_bytes = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def call(
        self, function: Callable[..., Output], *args: Any, seconds: float, deadline: float = np.inf
    ) -> Reply:
        """Run `function(state, *args)` in the worker and wait for its result.

        Args:
            function: Function of a module, which takes the state of the pool first.
            seconds: Limit of processor time.
            deadline: Time on the clock of `time.monotonic` at which waiting ends.

        Raises:
            UserError: The function raised it.
            WorkerLimitError: The job went over a limit, or crashed.
            WorkerLostError: The worker was killed.
        """
        self.start(function, *args, seconds=seconds)
        while not self.ready(min(60.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                self.kill()
                raise self._over_limit()
        return self.finish()

    def start(self, function: Callable[..., Output], *args: Any, seconds: float) -> None:
        """Send a job to the worker."""
        self._cpu_seconds = seconds
        job = Job(function, args, seconds, seconds * WALL_FACTOR)
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(job, protocol=5, buffer_callback=buffers.append)
        self.jobs += 1
        self._pending = True
        try:
            self._connection.settimeout(None)
            write_frame(self._connection, [head, *(buffer.raw() for buffer in buffers)])
        except OSError as error:
            raise self._ended() from error

    def ready(self, seconds: float) -> bool:
        """Wait up to `seconds` for the result; return whether it has begun to arrive."""
        if self.killed:
            return True
        try:
            self._connection.settimeout(max(0.0, seconds) or 1e-6)
            self._connection.recv(1, socket.MSG_PEEK)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError:
            return True
        return True

    def finish(self) -> Reply:
        """Receive the result. Raises as `call` does."""
        try:
            self._connection.settimeout(None)
            head, *buffers = read_frame(self._connection)
        except (EOFError, OSError) as error:
            raise self._ended() from error
        self._pending = False
        meta = json.loads(head)
        self.grown_bytes = int(meta["grown_bytes"])
        try:
            _raise_error(meta)
        except (WorkerFault, MemoryError) as error:
            self.kill()
            raise error if isinstance(error, WorkerFault) else self._over_limit() from error
        arrays = tuple(
            np.frombuffer(buffer, dtype=np.dtype(kind)).reshape(shape)
            for buffer, (kind, shape) in zip(buffers, meta["arrays"], strict=True)
        )
        return Reply(meta["value"], arrays, float(meta["cpu_seconds"]))

    @property
    def busy(self) -> bool:
        """Whether it can take no further job: it was killed, or its last one has not ended."""
        return self.killed or self._pending

    def kill(self) -> None:
        """End the worker: at once where it waits, else at its limit of time at the latest."""
        self.killed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the worker and free its connection. No other thread may use it any more."""
        self.kill()
        self._connection.close()

    def _ended(self) -> Exception:
        if self.killed or self._pool.closed:
            return WorkerLostError(f"a worker ended after {self.jobs} jobs")
        return self._over_limit()

    def _over_limit(self) -> WorkerLimitError:
        return WorkerLimitError(
            f"took more than {self._cpu_seconds:g} s of processor time or"
            f" {self._pool.memory_bytes >> 20} MiB of memory, and was stopped",
            expected="input that is quick to read",
            remedy="make it smaller or simpler",
        )


def _raise_error(meta: Mapping[str, Any]) -> None:
    """Raise what a reply says went wrong."""
    if "user_error" in meta:
        what, where, expected, remedy = map(str, meta["user_error"])
        raise UserError(what, where=where, expected=expected, remedy=remedy)
    if "fault" in meta:
        raise WorkerFault(*map(str, meta["fault"]))
    if "out_of_memory" in meta:
        raise MemoryError


class WorkerPool:
    """Workers forked from one template, which runs `setup(*args)` once and gives jobs its result.

    Args:
        setup: Function of a module, which returns the state. It must start no thread.
        args: Arguments of `setup`; they are pickled.
        idle: Number of workers kept for `worker`, forked in advance.
        memory_bytes: Memory that a worker may take beyond the template's.
    """

    def __init__(self, setup: Callable[..., Any], *args: Any, idle: int, memory_bytes: int) -> None:
        self._setup = pickle.dumps((setup, args), protocol=5)
        self._idle_count, self.memory_bytes = idle, memory_bytes
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def start(self) -> None:
        """Start the template and the idle workers.

        Raises UserError and WorkerFault as `setup` does, OSError where no process can be started.
        """
        with self._lock:
            while len(self._idle) < self._idle_count:
                self._idle.append(self._fork(self.memory_bytes))

    def fork(self, memory_bytes: int | None = None) -> Worker:
        """Fork a worker of one's own, with a limit of memory of its own; `close` ends it."""
        with self._lock:
            return self._fork(self.memory_bytes if memory_bytes is None else memory_bytes)

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """Lend an idle worker for the block, or a new one where none is left."""
        with self._lock:
            # An idle worker from which something can be read has ended.
            while self._idle and self._idle[-1].ready(0.0):
                self._idle.pop().close()
            worker = self._idle.pop() if self._idle else self._fork(self.memory_bytes)
        try:
            yield worker
        finally:
            self._take_back(worker)

    def close(self) -> None:
        """Kill all processes of the pool. Jobs that run fail with WorkerLostError."""
        with self._lock:
            self.closed = True
            self._end_template()
            for worker in self._idle:
                worker.close()
            self._idle.clear()

    def kill(self) -> None:
        """Kill all processes of the pool, without waiting for a thread that uses it."""
        self.closed = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _take_back(self, worker: Worker) -> None:
        """Keep a worker that is idle and fresh; put a new one in the place of any other."""
        fresh = worker.jobs < MAX_JOBS and worker.grown_bytes < MAX_GROWN_BYTES
        with self._lock:
            if worker.busy or not fresh:
                worker.close()
            if self.closed or len(self._idle) >= self._idle_count:
                worker.close()
                return
            # Without a new one, the next job forks its own.
            with contextlib.suppress(OSError):
                self._idle.append(self._fork(self.memory_bytes) if worker.killed else worker)

    def _fork(self, memory_bytes: int) -> Worker:
        """Ask the template for a worker; a template that has ended is started again."""
        if self.closed:
            raise WorkerLostError(f"a pool of {self._idle_count} workers is closed")
        ours, theirs = socket.socketpair()
        with theirs:
            message = FORK.pack(memory_bytes, NICE)
            try:
                socket.send_fds(self._started(), [message], [theirs.fileno()])
            except OSError:
                self._end_template()
                socket.send_fds(self._started(), [message], [theirs.fileno()])
        return Worker(self, ours)

    def _started(self) -> socket.socket:
        """The connection to the template, which is started where there is none."""
        if self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                number = theirs.fileno()
                inherited = {k: v for k, v in os.environ.items() if k.startswith(_INHERITED)}
                # A group of its own: Ctrl-C in a terminal does not reach it, and it is killed as
                # one.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _TEMPLATE, str(number), json.dumps(sys.path)],
                    pass_fds=[number],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**inherited, **_ENVIRONMENT},
                    start_new_session=True,
                )
            try:
                write_frame(self._control, [self._setup])
                self._control.settimeout(SETUP_SECONDS)
                _raise_error(json.loads(read_frame(self._control)[0]))
                self._control.settimeout(None)
            except (EOFError, OSError) as error:
                self._end_template()
                raise OSError("the process that worker processes are forked from ended") from error
            except BaseException:
                self._end_template()
                raise
        return self._control

    def _end_template(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
