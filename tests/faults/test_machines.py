"""Machines that come later, and processes that die, under torchrun: the run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import TUNE, a_job, started, wait_for_steps
from small_run import Task, losses

from finesight.launch.scripts import torchrun


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_grows_and_starts_again_what_died(tmp_path: Path, every: bool) -> None:
    """One machine learns until a second one comes; then a process of both is killed. Each time the
    run goes on from its newest checkpoint, and learns what one process learns."""
    if not every:
        pytest.skip("half a minute of starting processes: --every-fault")
    task = Task(tmp_path / "task")
    text = torchrun(a_job(task, "run", 1, epochs=40, save_every=10))
    # Half a minute for more machines to come, else.
    text = text.replace("=c10d", "=c10d --rdzv-conf=last_call_timeout=1")
    text = text.replace("29400", str(free_port()))
    folder = task.folder / "run"
    first = started(tmp_path, text, 1)
    wait_for_steps(folder, 4, first)
    second = started(tmp_path, text, 1)
    wait_for_processes(folder, [1, 2], first)
    os.kill(rank_of(second.pid), signal.SIGKILL)
    for process in (first, second):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert processes(folder) == [1, 2, 2]
    assert json.loads((folder / "result.json").read_text())["steps"] == 110
    alone = task.run("train.epochs=40", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 110
    # Rounding grows from step to step.
    assert dict(losses(folder)) == pytest.approx(dict(losses(task.folder / "alone")), rel=1e-3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def processes(folder: Path) -> list[int]:
    """How many learned together, each time that the run was begun or gone on with."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["processes"] for line in lines if "processes" in line]


def wait_for_processes(folder: Path, counts: list[int], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while processes(folder) != counts:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rank_of(launcher: int) -> int:
    """The process that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = [c for c in children if b"finesight" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return int(ranks[-1])
