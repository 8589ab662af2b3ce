import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pool_jobs as jobs
import pytest
from attack_client import list_process_tree, list_running

from finesight.errors import UserError
from finesight.files import worker_pool as area
from finesight.files.storage import FileLock
from finesight.files.worker_pool import (
    WORKER_NICENESS,
    JobOutput,
    WorkerJobError,
    WorkerLimitError,
    WorkerLostError,
    WorkerPool,
)

MIB = 1 << 20


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    monkeypatch.setenv("FINESIGHT_KEY", "a secret of the server")
    made = WorkerPool(jobs.load, 7, num_idle=2, memory_bytes=64 * MIB)
    made.start()
    yield made
    made.close()


def pids(pool: WorkerPool, number: int = 2) -> set[int]:
    """Processes of the idle workers."""
    with ThreadPoolExecutor(number) as threads:
        barrier = threading.Barrier(number)

        def ask(_: int) -> int:
            with pool.borrow_worker() as worker:
                barrier.wait(60)
                return int(worker.call(jobs.describe, np.zeros(1), max_cpu_s=1).value["pid"])

        return set(threads.map(ask, range(number)))


def call(pool: WorkerPool, job: Callable[..., JobOutput], *args: Any, **limits: Any) -> JobOutput:
    with pool.borrow_worker() as worker:
        return worker.call(job, *args, **{"max_cpu_s": 1} | limits)


def test_values_and_arrays_come_back(pool):
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    reply = call(pool, jobs.describe, array)
    assert (reply.value["number"], reply.value["jobs"]) == (7, 1)
    assert [found.tolist() for found in reply.arrays] == [array.tolist(), array.T.tolist()]
    assert [found.dtype for found in reply.arrays] == [np.int16, np.float32]
    assert 0 <= reply.cpu_seconds < 1
    large = np.arange(3 * MIB, dtype=np.uint8)
    assert np.array_equal(call(pool, jobs.describe, large).arrays[0], large)


def test_workers_are_used_again(pool):
    first = pids(pool)
    assert len(first) == 2
    assert pids(pool) == first
    with pytest.raises(UserError) as raised:
        call(pool, jobs.refuse)
    error = raised.value
    assert (error.what, error.where) == ("is 3", "field")
    assert (error.expected, error.remedy) == ("4", "correct it")
    assert pids(pool) == first, "an error of the user has replaced a worker"
    hoarder = call(pool, jobs.hoard, area.MAX_RSS_INCREASE + 8 * MIB).value
    assert hoarder in first
    assert hoarder not in pids(pool)


@pytest.mark.parametrize(
    ("job", "args", "reason"),
    [
        (jobs.spin, (), r"0\.3 s of CPU time"),
        (jobs.allocate_memory, (200 * MIB,), "MiB of memory"),
        (jobs.crash, (), "crashed"),
    ],
)
def test_a_job_beyond_its_limits_is_killed_and_its_worker_replaced(pool, job, args, reason):
    first = pids(pool)
    with pytest.raises(WorkerLimitError, match=reason):
        call(pool, job, *args, max_cpu_s=0.3)
    second = pids(pool)
    assert (len(second), len(first & second)) == (2, 1)


def test_limits_of_memory_and_time(pool):
    assert call(pool, jobs.allocate_memory, 30 * MIB).value == 30 * MIB
    assert call(pool, jobs.sleep, 0.5, max_cpu_s=0.3).value == 0.5, "waiting takes no CPU time"
    with pool.fork(8 * MIB) as worker, pytest.raises(WorkerLimitError):
        worker.call(jobs.allocate_memory, 30 * MIB, max_cpu_s=1)
    with pool.fork(200 * MIB) as worker:
        assert worker.call(jobs.allocate_memory, 100 * MIB, max_cpu_s=1).value == 100 * MIB
    began = time.monotonic()
    with pytest.raises(WorkerLimitError):
        call(pool, jobs.sleep, 60.0, max_cpu_s=60, deadline=began + 0.2)
    assert time.monotonic() - began < 60, "the job was not ended"


@pytest.mark.parametrize("job", [jobs.send_part, jobs.send_slowly])
def test_the_deadline_includes_the_transfer_of_a_result(pool, job):
    began = time.monotonic()
    with pool.fork() as worker:
        with pytest.raises(WorkerLimitError, match=r"took more than 0\.3 s, and was killed"):
            worker.call_within(0.3, job)
        assert worker.is_killed
    assert time.monotonic() - began < 60


def test_tiny_rest_of_cpu_time_is_named(pool):
    with pool.fork() as worker, pytest.raises(WorkerLimitError, match="s of CPU time"):
        worker.call(jobs.spin, max_cpu_s=0.0005)


def test_the_deadline_includes_the_transfer_of_a_job(pool):
    """A stopped process reads nothing, so that a large job fills the buffer of the connection."""
    with pool.fork() as worker:
        worker.call_within(60, jobs.stop_later)
        time.sleep(0.3)
        with pytest.raises(WorkerLimitError, match=r"took more than 0\.3 s"):
            worker.call_within(0.3, jobs.describe, np.zeros(8 * MIB, dtype=np.uint8))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        "[" * 100_000,
        "{}",
        '{"rss_increase": "x", "cpu_seconds": 0}',
        '{"rss_increase": 0, "cpu_seconds": 0, "arrays": [["O", [1]]]}',
        '{"rss_increase": 0, "cpu_seconds": 0, "arrays": 3}',
        '{"rss_increase": 0, "cpu_seconds": 0, "arrays": [["u1,,", [1]]]}',
        '{"rss_increase": 0, "cpu_seconds": 0, "user_error": ["a"]}',
        '{"rss_increase": 0, "cpu_seconds": 0, "fault": []}',
    ],
)
def test_invalid_replies_end_their_worker_only(pool, text):
    with pool.fork() as worker:
        with pytest.raises(WorkerLimitError):
            worker.call_within(2, jobs.send_text, text)
        assert worker.is_killed
    assert len(pids(pool)) == 2


def test_deadlines_without_a_thread_end_their_worker_only(pool, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with pool.fork() as worker:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(WorkerLimitError, match="no thread"):
                worker.call_within(2, jobs.describe, np.zeros(3, dtype=np.uint8))
        assert worker.is_killed


def test_connections_that_a_job_closes(pool):
    with pool.fork() as worker, pytest.raises(WorkerLimitError, match="crashed"):
        worker.call_within(60, jobs.close_sockets)


def test_replies_have_a_maximum_size():
    pool = WorkerPool(jobs.load, 7, num_idle=0, memory_bytes=64 * MIB, max_reply_bytes=MIB)
    try:
        with pool.fork() as worker:
            small = np.zeros(MIB // 8, dtype=np.uint8)
            worker.call(jobs.describe, small, max_cpu_s=1)
            with pytest.raises(WorkerLimitError, match="sent a reply of more than"):
                worker.call(jobs.describe, np.zeros(MIB + 1, dtype=np.uint8), max_cpu_s=1)
    finally:
        pool.close()


def test_worker_exception_reports_location_only(pool):
    first = pids(pool)
    with pytest.raises(WorkerJobError) as raised:
        call(pool, jobs.fail)
    assert raised.value.error_name == "ZeroDivisionError"
    text = f"{raised.value} {raised.value.traceback_text}"
    assert "in fail" in text
    assert "a secret" not in text.replace('("a secret")', ""), "the message is not reported"
    assert len(first & pids(pool)) == 1


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_job_that_is_cancelled(pool, end):
    with pool.borrow_worker() as worker:
        timer = threading.Timer(0.2, worker.kill if end == "kill" else pool.close)
        timer.start()
        with pytest.raises(WorkerLostError):
            worker.call(jobs.sleep, 60.0, max_cpu_s=60)
    timer.join()
    if end == "close":
        with pytest.raises(WorkerLostError):
            pool.fork()


@pytest.mark.parametrize("job", ["running", "idle"])
def test_a_worker_ends_at_once_with_its_connection(pool, job):
    """Cancelled jobs would otherwise pile up until their time limits."""
    with pool.fork() as worker:
        pid = int(worker.call(jobs.describe, np.zeros(1), max_cpu_s=1).value["pid"])
        if job == "running":
            worker.start(jobs.spin, max_cpu_s=600)
            assert not worker.wait(0.2)
    assert not list_running([pid])


def test_data_of_the_connection_do_not_end_a_job(pool):
    """The kernel announces the last bytes of a job when the worker may already run it."""
    with pool.fork() as worker:
        worker.start(jobs.sleep, 0.5, max_cpu_s=1)
        worker.wait(0.2)  # until it runs
        worker._connection.send(0)
        assert worker.get_result().value == 0.5


PARENT = """
import sys, time
import numpy as np, pool_jobs as jobs
from finesight.files.worker_pool import WorkerPool
pool = WorkerPool(jobs.load, 7, num_idle=1, memory_bytes=64 << 20)
pool.start()
busy = pool.fork()
pid = busy.call(jobs.describe, np.zeros(1), max_cpu_s=1).value["pid"]
busy.start(getattr(jobs, sys.argv[1]), max_cpu_s=600)
print(pid, pool.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("job", "num_processes"), [("spin", 3), ("resist", 4)])
def test_no_process_survives_its_parent(job, num_processes):
    command = [sys.executable, "-c", PARENT, job]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        busy, template = map(int, parent.stdout.readline().split())
        # Its idle worker as well, and the process that a job starts.
        group = set[int]()
        while len(group) < num_processes:
            group = {process.pid for process in list_process_tree(template)}
            time.sleep(0.02)
        parent.kill()
    assert {busy, template} < group
    assert not list_running(group)


def test_workers_have_low_priority_and_no_pool_handles(pool):
    found = call(pool, jobs.limits).value
    assert found["nice"] >= min(os.nice(0) + WORKER_NICENESS, 19)
    assert found["group"] != os.getpgrp()
    # Standard streams, its two connections, and what lists the folder.
    assert len(found["open"]) == 6
    assert "PATH" in found["environment"]
    assert "FINESIGHT_KEY" not in found["environment"]


def test_killed_processes_are_replaced_and_none_is_left(pool):
    for pid in (killed := pids(pool)):
        os.kill(pid, signal.SIGKILL)
    assert not list_running(killed)
    assert len(pids(pool)) == 2
    os.kill(pool.process.pid, signal.SIGKILL)
    pool.process.wait()
    with pool.fork() as worker:
        assert worker.call(jobs.describe, np.zeros(1), max_cpu_s=1).value["number"] == 7
    processes = {pool.process.pid, *pids(pool)}
    pool.close()
    assert not list_running(processes)


def test_many_threads_at_once(pool):
    def ask(number: int) -> int:
        return int(call(pool, jobs.describe, np.array([number])).arrays[0][0])

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(200))) == list(range(200))
    assert len(pool.idle_workers) == 2


def test_failing_setup_is_reported_at_start():
    with pytest.raises(UserError, match="is 3"):
        WorkerPool(jobs.refuse, {}, num_idle=1, memory_bytes=MIB).start()
    with pytest.raises(WorkerJobError, match="ZeroDivisionError"):
        WorkerPool(jobs.fail, {}, num_idle=1, memory_bytes=MIB).start()
    with pytest.raises(OSError, match="ended"):
        WorkerPool(jobs.crash, {}, num_idle=1, memory_bytes=MIB).start()


KILLED_BEFORE_WORKER_STARTS = """
import multiprocessing, os, signal, time
from finesight.files.worker_pool import exit_with_parent

parent = os.getpid()

def work():
    while os.getppid() == parent:
        time.sleep(0.01)
    exit_with_parent()
    time.sleep(600)

workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
for worker in workers:
    worker.start()
print(*(worker.pid for worker in workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_forked_process_does_not_hold_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    try:
        lock.close()
        with FileLock(tmp_path) as other:
            other.acquire(wait=False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_fork_does_not_release_lock_of_parent(tmp_path: Path) -> None:
    with FileLock(tmp_path) as lock:
        lock.acquire()
        child = os.fork()
        if child == 0:
            lock.close()  # closed already: no other file of that number may be closed
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with FileLock(tmp_path) as other, pytest.raises(BlockingIOError):
            other.acquire(wait=False)


def test_worker_of_a_killed_parent_exits_at_start() -> None:
    command = [sys.executable, "-c", KILLED_BEFORE_WORKER_STARTS]
    parent = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert parent.returncode == -signal.SIGKILL
    left = list_running([*map(int, parent.stdout.split())])
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
