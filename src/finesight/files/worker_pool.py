"""Pool of worker processes that handle untrusted input with limits on time and memory.

A pool has one template process, whose program is `main`. It loads the state that all jobs share,
stays single-threaded, and forks a worker for each connection that the pool sends; a fork takes
milliseconds. A worker runs one job after another. Each job has a limit of CPU time, which the
kernel enforces. The kernel also kills a worker when the pool closes its connection, and when the
process of the pool ends. A worker that exceeds a limit or crashes is replaced. Its job fails with
`WorkerLimitError`, and other jobs are not affected.

Requests are pickled, since only the pool sends them. Replies are JSON and raw arrays: a file that a
worker decodes may compromise it, and unpickling its reply could execute code.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError


@dataclass(frozen=True, slots=True)
class JobOutput:
    """Result of a job in a worker: JSON value, NumPy arrays, and CPU seconds of the job."""

    value: Any = None
    arrays: Sequence[NDArray[np.generic]] = ()
    cpu_seconds: float = 0.0


def main(number: int) -> None:
    """Run the template process: load the shared state, then fork a worker for each connection.

    Args:
        number: File descriptor of the control connection. The process ends when the pool closes it.
    """
    control = Connection(number)
    # Ctrl-C reaches every process of the terminal; the pool ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers that have ended are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        setup, args = control.recv()
        state: list[Any] = []

        def load() -> JobOutput:
            state.append(setup(*args))
            return JobOutput()

        control.send_bytes(json.dumps(_outcome(load).value).encode())
        gc.collect()
        gc.freeze()
        lifelines: list[Connection] = []
        while state:
            memory_bytes, has_own_group = control.recv()
            connections = [Connection(recv_handle(control)) for _ in range(2)]
            try:
                pid = os.fork()
            except OSError:  # the limit of processes: only this worker is missing
                for one in connections:
                    one.close()
                continue
            if pid == 0:
                control.close()
                for one in lifelines:
                    one.close()
                _run_worker(connections, state[0], memory_bytes, has_own_group)
            connections[0].close()
            # The kernel signals the group of a worker that has ended only while its lifeline is
            # open in some process.
            for one in [one for one in lifelines if one.poll()]:
                lifelines.remove(one)
                one.close()
            if has_own_group:
                lifelines.append(connections[1])
            else:
                connections[1].close()
    # Jobs may have started processes, or ignore the signal that ends their worker.
    os.killpg(os.getpid(), signal.SIGKILL)


def _run_worker(
    connections: Sequence[Connection], state: Any, memory_bytes: int, has_own_group: bool
) -> None:
    """Run the jobs that the pool sends until it closes the connection.

    Ends the process and never returns.

    Args:
        connections: Connection of jobs and replies, and one without data. The kernel kills this
            process by SIGIO when the pool closes the second one. SIGIO of the first one would also
            announce data, possibly after they have been read.
        has_own_group: Whether the worker has a process group, so that the programs that its jobs
            have started are killed with it, and by SIGKILL.
    """
    connection, lifeline = connections
    # Jobs may wait for processes of their own.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        _apply_limits(memory_bytes)
        owner = os.getpid()
        if has_own_group:
            os.setpgid(0, 0)
            owner = -owner
            if hasattr(fcntl, "F_SETSIG"):  # not on macOS
                fcntl.fcntl(lifeline.fileno(), fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline.fileno(), fcntl.F_SETOWN, owner)
        fcntl.fcntl(lifeline.fileno(), fcntl.F_SETFL, os.O_ASYNC)
        base = _resident_bytes()
        with contextlib.suppress(EOFError, ConnectionError):
            while not lifeline.poll():  # The pool may have closed it before O_ASYNC was set.
                parts = [bytearray(connection.recv_bytes()) for _ in range(1 + connection.recv())]
                function, args, max_cpu_s = pickle.loads(parts[0], buffers=parts[1:])
                start_time = time.process_time()
                reply = _run_job(partial(function, state, *args), max_cpu_s)
                usage = {
                    "cpu_seconds": time.process_time() - start_time,
                    "rss_increase": _resident_bytes() - base,
                }
                connection.send_bytes(json.dumps(reply.value | usage).encode())
                for array in reply.arrays:
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    connection.send_bytes(content.data)
        os._exit(0)
    finally:
        os._exit(1)


def _compute_wall_limit(max_cpu_s: float) -> float:
    """Return the wall-clock limit in seconds of a job with a limit of CPU time."""
    return max(MIN_WALL_S, max_cpu_s * WALL_FACTOR)


def _run_job(job: Callable[[], JobOutput], max_cpu_s: float) -> JobOutput:
    """Run a job, and return the reply. The kernel kills this process after a time limit."""
    pid = os.getpid()
    signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
    signal.setitimer(signal.ITIMER_REAL, _compute_wall_limit(max_cpu_s))
    try:
        return _outcome(job)
    finally:
        if os.getpid() != pid:  # a process that the job has forked
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _outcome(function: Callable[[], JobOutput]) -> JobOutput:
    """Call a function, and return the reply of a worker: JSON data and arrays."""
    try:
        output = function()
    except UserError as error:
        words = [error.what, error.where, error.expected, str(error.remedy)]
        return JobOutput({"user_error": words})
    except MemoryError:
        return JobOutput({"out_of_memory": True})
    except Exception as error:
        # Its message may quote what a client sent.
        frames = traceback.format_tb(error.__traceback__)
        return JobOutput({"fault": [type(error).__name__, "".join(frames)]})
    kinds = [[array.dtype.str, array.shape] for array in output.arrays]
    return JobOutput({"value": output.value, "arrays": kinds}, output.arrays)


def _apply_limits(memory_bytes: int) -> None:
    """Set CPU priority and memory limit of this worker, and discard its output.

    Native code may print untrusted input.
    """
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)
    if devnull > 2:
        os.close(devnull)
    os.nice(WORKER_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Out of memory, the kernel kills a worker before the server.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    limit_memory(memory_bytes)


def limit_memory(memory_bytes: int) -> None:
    """Limit the memory of this process to its present size and `memory_bytes`."""
    with contextlib.suppress(OSError):  # no /proc on macOS
        limit = _read_statm(0) + memory_bytes
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        if hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _resident_bytes() -> int:
    try:
        return _read_statm(1)
    except OSError:  # no /proc on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _read_statm(column: int) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[column]) * resource.getpagesize()


WORKER_NICENESS = 10
"""Nice level of workers, so that they have a lower CPU priority than the process of the pool."""

WALL_FACTOR = 15
"""Wall-clock limit of a job relative to its CPU time limit, since workers may wait for a CPU."""

MIN_WALL_S = 1.0
"""Least wall-clock limit: the CPU time that the last job of a request has left may be tiny."""

MAX_JOBS = 500
MAX_RSS_INCREASE = 32 << 20
"""Limits after which an idle worker is replaced: number of jobs, and growth of its memory."""

UNLIMITED_MEMORY = 1 << 46
"""Memory limit of workers that run programs of the user, beyond the memory of any machine."""

SETUP_SECONDS = 120.0

_TEMPLATE = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from finesight.files.worker_pool import main
main(int(sys.argv[1]))
"""
"""Program of the template process, with the module search path of this process."""

_INHERITED = ("PATH", "HOME", "LANG", "LC_", "LD_", "DYLD_", "PYTHON", "TMPDIR", "TZ")
"""Prefixes of the environment variables that workers inherit; API keys are not among them."""

_INVALID_REPLY = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    RecursionError,
    SyntaxError,  # of a data type
)
"""Exceptions while a reply is read that the worker has damaged."""

_ENVIRONMENT = {
    # A process with threads must not fork.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}


class _ReplySizeError(Exception):
    """A message of a worker is longer than its limit, the argument."""


class WorkerLimitError(UserError):
    """Raised when a job exceeded a limit and was stopped, or when its worker crashed."""


class WorkerLostError(Exception):
    """Raised when a worker ended because its pool or its job was canceled."""


class WorkerJobError(Exception):
    """Raised when a job raised an internal error.

    `traceback_text` is the traceback in the worker, without the message.
    """

    def __init__(self, error_name: str, traceback_text: str) -> None:
        super().__init__(error_name)
        self.error_name, self.traceback_text = error_name, traceback_text


class JobCancellation:
    """Cancels the jobs of a request, also those that start later.

    A job belongs to the request whose cancellation is `CURRENT_CANCELLATION` when it borrows its
    worker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self.is_cancelled = False

    def cancel(self) -> None:
        """Kill the workers of the request."""
        with self._lock:
            self.is_cancelled = True
            for worker in self._workers:
                worker.kill()

    @contextlib.contextmanager
    def hold(self, worker: Worker) -> Iterator[None]:
        """Allow `cancel` to end a worker within the `with` block."""
        with self._lock:
            self._workers.add(worker)
            if self.is_cancelled:
                worker.kill()
        try:
            yield
        finally:
            with self._lock:
                self._workers.discard(worker)


CURRENT_CANCELLATION: ContextVar[JobCancellation | None] = ContextVar("cancellation", default=None)
"""Cancellation of the request that this thread works for. Threads of anyio inherit it."""


class Worker(contextlib.AbstractContextManager["Worker"]):
    """Connection to a worker process, which runs one job at a time.

    `call` runs a job and blocks; `start`, `wait` and `get_result` run a job without blocking. Only
    one thread may use a worker at a time, but any thread may `kill` or `close` it. As a context
    manager, it closes the worker at the end of the block.
    """

    def __init__(
        self, pool: WorkerPool, sockets: Sequence[socket.socket], memory_bytes: int
    ) -> None:
        self._pool, self._sockets = pool, sockets
        self._connection = Connection(os.dup(sockets[0].fileno()))
        self._memory_bytes, self._max_cpu_s, self._start_time = memory_bytes, 0.0, 0.0
        self._lock = threading.Lock()
        self.is_killed = self.is_pending = False
        self.jobs = 0
        self.rss_increase = 0

    def __exit__(self, *problem: object) -> None:
        self.close()

    def call(
        self,
        function: Callable[..., JobOutput],
        *args: Any,
        max_cpu_s: float,
        deadline: float = np.inf,
    ) -> JobOutput:
        """Run `function(state, *args)` in the worker, and wait for its result.

        Args:
            function: Module-level function. Its first argument is the state of the pool.
            deadline: Time on the clock of `time.monotonic` at which waiting ends.

        Raises:
            UserError: The function raised it.
            WorkerLimitError: The job exceeded a limit, or crashed.
            WorkerLostError: The worker was killed.
        """
        # Waiting with a timeout is not enough: a stopped worker may read only a part of the job, or
        # send only a part of its result.
        with _kill_at(deadline, self) as is_late:
            try:
                self.start(function, *args, max_cpu_s=max_cpu_s)
                while not self.wait(60.0):
                    pass
                return self.get_result()
            except WorkerLostError as error:
                if is_late.is_set():
                    raise _build_limit_error("did not end in time") from error
                raise

    def call_within(
        self, seconds: float, function: Callable[..., JobOutput], *args: Any
    ) -> JobOutput:
        """Run a job like `call`, for at most `seconds`, waiting included."""
        deadline = time.monotonic() + seconds
        # Only the deadline ends a job: with several threads, CPU time passes faster.
        max_cpu_s = seconds * (os.cpu_count() or 1)
        try:
            return self.call(function, *args, max_cpu_s=max_cpu_s, deadline=deadline)
        except WorkerLimitError as error:
            if time.monotonic() >= deadline:
                error.what = f"took more than {seconds:g} s, and was killed"
            error.expected = f"a result within {seconds:g} s"
            raise

    def start(self, function: Callable[..., JobOutput], *args: Any, max_cpu_s: float) -> None:
        """Send a job to the worker without waiting for its result."""
        self._max_cpu_s, self._start_time = max_cpu_s, time.monotonic()
        job, buffers = (function, args, max_cpu_s), list[pickle.PickleBuffer]()
        payload = pickle.dumps(job, protocol=5, buffer_callback=buffers.append)
        self.jobs += 1
        self.is_pending = True
        try:
            with self._lock:
                self._connection.send(len(buffers))
                self._connection.send_bytes(payload)
                for buffer in buffers:
                    self._connection.send_bytes(buffer.raw())
        except OSError as error:
            raise self._exit_error() from error

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for a result; return whether it can be received."""
        if self.is_killed:
            return True
        try:
            with self._lock:
                return self._connection.poll(max(0.0, timeout_s))
        except OSError:
            return True

    def get_result(self) -> JobOutput:
        """Receive the result of the job that `start` sent. Raises like `call`."""
        try:
            with self._lock:
                meta, arrays = self._receive()
            cpu_seconds = float(meta["cpu_seconds"])
            self.rss_increase = int(meta["rss_increase"])
        except _ReplySizeError as error:
            self.kill()
            raise _build_limit_error(f"sent a reply of more than {error} bytes") from error
        except (EOFError, OSError) as error:
            raise self._exit_error() from error
        except _INVALID_REPLY as error:
            self.kill()
            raise _build_limit_error("sent a reply that cannot be read") from error
        self.is_pending = False
        try:
            _raise_error(meta)
        except _INVALID_REPLY as error:
            self.kill()
            raise _build_limit_error("sent an error that cannot be read") from error
        except (WorkerJobError, MemoryError) as error:
            self.kill()
            if isinstance(error, WorkerJobError):
                raise
            memory = f"{self._memory_bytes >> 20} MiB"
            raise _build_limit_error(f"took more than {memory} of memory") from error
        return JobOutput(meta.get("value"), arrays, cpu_seconds)

    def _receive(self) -> tuple[dict[str, Any], list[NDArray[np.generic]]]:
        """Receive a reply. Raises _ReplySizeError if it is larger than the limits of replies."""
        num_free = min(self._memory_bytes, self._pool.max_reply_bytes)
        payload = self._receive_bytes(min(num_free, self._pool.max_value_bytes))
        num_free -= len(payload)
        meta = json.loads(payload)
        if not isinstance(meta, dict):
            raise TypeError(f"a reply of the type {type(meta).__name__}")
        arrays = []
        for dtype, shape in meta.get("arrays", ()):
            data_type = np.dtype(dtype)
            data = bytearray(self._receive_bytes(num_free))
            num_free -= len(data)
            arrays.append(np.frombuffer(data, dtype=data_type).reshape(shape))
        return meta, arrays

    def _receive_bytes(self, max_bytes: int) -> bytes:
        try:
            return self._connection.recv_bytes(max_bytes)
        except OSError as error:
            # `Connection` has no other sign of a message that is too long.
            if str(error) == "bad message length":
                raise _ReplySizeError(max_bytes) from error
            raise

    def kill(self) -> None:
        """End the worker process and the job that it runs."""
        self.is_killed = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the worker process and close its connection.

        A blocked `call` raises WorkerLostError.
        """
        self.kill()
        with self._lock:
            self._connection.close()
        for one in self._sockets:
            one.close()

    def _exit_error(self) -> Exception:
        if self.is_killed or self._pool.is_closed:
            return WorkerLostError(f"a worker ended after {self.jobs} jobs")
        elapsed_s = time.monotonic() - self._start_time
        wall_limit_s = _compute_wall_limit(self._max_cpu_s)
        if elapsed_s >= wall_limit_s:
            return _build_limit_error(f"took more than {wall_limit_s:g} s")
        # The threads of a job may use several CPUs.
        if elapsed_s >= self._max_cpu_s / 2:
            return _build_limit_error(f"took more than {self._max_cpu_s:g} s of CPU time")
        return _build_limit_error("crashed its worker process")


@contextlib.contextmanager
def _kill_at(deadline: float, worker: Worker) -> Iterator[threading.Event]:
    """Kill a worker at a time on the clock of `time.monotonic`, within the `with` block.

    The kill ends calls that send to the worker or receive from it. The event is set before.
    """
    is_late = threading.Event()
    if deadline == np.inf:
        yield is_late
        return

    def kill() -> None:
        is_late.set()
        worker.kill()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:  # a limit of processes
        worker.kill()
        raise _build_limit_error("has no thread for its time limit") from error
    try:
        yield is_late
    finally:
        timer.cancel()
        # So that a late kill does not end the next job.
        timer.join()


def _build_limit_error(what: str) -> WorkerLimitError:
    return WorkerLimitError(
        f"{what}, and was killed",
        expected="input within the time and memory limits",
        remedy="use smaller or simpler input",
    )


def _raise_error(meta: Mapping[str, Any]) -> None:
    """Raise the error that a reply of a worker contains, if any."""
    if "user_error" in meta:
        what, where, expected, remedy = map(str, meta["user_error"])
        raise UserError(what, where=where, expected=expected, remedy=remedy)
    if "fault" in meta:
        raise WorkerJobError(*map(str, meta["fault"]))
    if "out_of_memory" in meta:
        raise MemoryError


class WorkerPool:
    """Pool of worker processes that are forked from one template process.

    Args:
        setup: Module-level function that returns the state that all jobs share. It runs in the
            template process and must not start threads.
        args: Arguments of `setup`; they are pickled.
        inherits_environment: Whether the workers inherit the complete environment, for programs of
            the user. Otherwise, they inherit no API keys.
        has_own_groups: Whether closing a worker kills the programs that its jobs have started, too.
            Close all workers before the pool.
        max_reply_bytes: Maximum size of a reply, if it is less than the memory of a worker.
        max_value_bytes: Maximum size of its value as JSON, without arrays.

    Attributes:
        process: Template process; None before the start.
        idle_workers: Workers that wait for a job.
    """

    def __init__(
        self,
        setup: Callable[..., Any],
        *args: Any,
        num_idle: int,
        memory_bytes: int,
        inherits_environment: bool = False,
        has_own_groups: bool = False,
        max_reply_bytes: int = UNLIMITED_MEMORY,
        max_value_bytes: int = UNLIMITED_MEMORY,
    ) -> None:
        self._setup = pickle.dumps((setup, args), protocol=5)
        self._num_idle, self.memory_bytes = num_idle, memory_bytes
        self._inherited = "" if inherits_environment else _INHERITED
        self._has_own_groups = has_own_groups
        self.max_reply_bytes = max_reply_bytes
        self.max_value_bytes = max_value_bytes
        self._lock = threading.Lock()
        self.idle_workers: list[Worker] = []
        self._control: Connection | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.is_closed = False

    def start(self) -> None:
        """Start the template process and the idle workers.

        Raises UserError or WorkerJobError if `setup` fails, and OSError if no process can be
        started.
        """
        with self._lock:
            while len(self.idle_workers) < self._num_idle:
                self.idle_workers.append(self._fork(self.memory_bytes))

    def fork(self, memory_bytes: int | None = None) -> Worker:
        """Fork a worker with its own memory limit, which the caller must close."""
        with self._lock:
            return self._fork(self.memory_bytes if memory_bytes is None else memory_bytes)

    @contextlib.contextmanager
    def borrow_worker(self) -> Iterator[Worker]:
        """Lend an idle or new worker for the `with` block.

        Raises WorkerLostError if the jobs of the current request are cancelled.
        """
        cancellation = CURRENT_CANCELLATION.get()
        if cancellation is not None and cancellation.is_cancelled:
            raise WorkerLostError("the jobs of the request are cancelled")
        with self._lock:
            # An idle worker whose connection is readable has ended.
            while self.idle_workers and self.idle_workers[-1].wait(0.0):
                self.idle_workers.pop().close()
            worker = self.idle_workers.pop() if self.idle_workers else self._fork(self.memory_bytes)
        try:
            with contextlib.nullcontext() if cancellation is None else cancellation.hold(worker):
                yield worker
        finally:
            self._return_worker(worker)

    def close(self) -> None:
        """Kill all processes of the pool; running jobs fail with WorkerLostError."""
        with self._lock:
            self.is_closed = True
            self._end_template()
            for worker in self.idle_workers:
                worker.close()
            self.idle_workers.clear()

    def kill(self) -> None:
        """Kill all processes of the pool, without waiting for threads that use it."""
        self.is_closed = True
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _return_worker(self, worker: Worker) -> None:
        """Make a worker available for the next job, or replace it."""
        is_fresh = worker.jobs < MAX_JOBS and worker.rss_increase < MAX_RSS_INCREASE
        with self._lock:
            if worker.is_killed or worker.is_pending or not is_fresh:
                worker.close()
            if self.is_closed or len(self.idle_workers) >= self._num_idle:
                worker.close()
                return
            # If the fork fails, the next job forks its own worker.
            with contextlib.suppress(OSError, UserError, WorkerJobError):
                self.idle_workers.append(
                    self._fork(self.memory_bytes) if worker.is_killed else worker
                )

    def _fork(self, memory_bytes: int) -> Worker:
        """Fork a worker, and restart the template process if it has ended."""
        if self.is_closed:
            raise WorkerLostError(f"a pool of {self._num_idle} workers is closed")
        own, remote = zip(socket.socketpair(), socket.socketpair(), strict=True)
        with remote[0], remote[1]:
            try:
                self._send_fork(memory_bytes, remote)
            except OSError:
                self._end_template()
                self._send_fork(memory_bytes, remote)
        return Worker(self, own, memory_bytes)

    def _send_fork(self, memory_bytes: int, sockets: Sequence[socket.socket]) -> None:
        control = self._get_control()
        control.send((memory_bytes, self._has_own_groups))
        for one in sockets:
            send_handle(control, one.fileno(), 0)

    def _get_control(self) -> Connection:
        """Return the connection to the template process, and start the process if there is none."""
        if self._control is None:
            self._control, child_connection = multiprocessing.Pipe()
            with child_connection:
                fd = child_connection.fileno()
                inherited = {k: v for k, v in os.environ.items() if k.startswith(self._inherited)}
                # A process group of its own: Ctrl-C in a terminal does not reach it, and one
                # signal kills the template and all workers.
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _TEMPLATE, str(fd), json.dumps(sys.path)],
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**inherited, **_ENVIRONMENT},
                    start_new_session=True,
                )
            try:
                self._control.send_bytes(self._setup)
                if not self._control.poll(SETUP_SECONDS):
                    raise TimeoutError
                _raise_error(json.loads(self._control.recv_bytes()))
            except BaseException as error:
                self._end_template()
                if not isinstance(error, EOFError | OSError):
                    raise
                raise OSError("the process that worker processes are forked from ended") from error
        return self._control

    def _end_template(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def exit_with_parent() -> None:
    """End this worker process as soon as the process that started it dies.

    Called in processes of `multiprocessing`, which would otherwise wait for work forever.
    DataLoader workers of torch notice a dead parent after 5 s, and never if it dies before they
    have started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process of multiprocessing"
    sentinel = parent.sentinel

    def wait_for_death() -> None:
        # The pipe behind the sentinel closes with the parent. Workers that were forked later hold
        # a copy of it, and end first.
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_death, daemon=True).start()
