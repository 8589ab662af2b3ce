"""Locks and lifetimes of child processes when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finesight.storage import FileLock

KILLED_BEFORE_WORKER_STARTS = """
import multiprocessing, os, signal, time
from finesight.worker_pool import exit_with_parent

def work():
    time.sleep(0.5)  # the parent is dead by now
    exit_with_parent()
    time.sleep(600)

workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
for worker in workers:
    worker.start()
print(*(worker.pid for worker in workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Nobody may be there to collect the exit status of an orphan.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> None:
    """Wait for processes to end; kill the ones that do not, and fail."""
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} of {len(pids)} processes have outlived their parent")
        time.sleep(0.02)


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
    parent = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_WORKER_STARTS], stdout=subprocess.PIPE, text=True
    )
    assert parent.returncode == -signal.SIGKILL
    wait_until_gone([int(pid) for pid in parent.stdout.split()])
