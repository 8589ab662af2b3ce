"""Elastic torchrun: machines that join, and ranks that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_fixtures import TUNE, make_job, run_job_script, wait_for_steps
from tiny_task import TinyTask, read_losses

from finesight.launch.launch_job import build_torchrun_script


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_scales_up_and_restarts_dead_rank(tmp_path: Path, every_point: bool) -> None:
    """A second machine joins, then a rank is killed; the result equals that of a single process."""
    if not every_point:
        pytest.skip("half a minute of starting processes: --every-fault")
    task = TinyTask(tmp_path / "task")
    text = build_torchrun_script(make_job(task, "run", 1, epochs=40, save_every=10))
    # Half a minute for more machines to come, else.
    text = text.replace("=c10d", "=c10d --rdzv-conf=last_call_timeout=1")
    text = text.replace("29400", str(free_port()))
    folder = task.folder / "run"
    first = run_job_script(tmp_path, text, 1)
    wait_for_steps(folder, 4, first)
    second = run_job_script(tmp_path, text, 1)
    wait_for_processes(folder, [1, 2], first)
    os.kill(rank_of(second.pid), signal.SIGKILL)
    for process in (first, second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert world_sizes(folder) == [1, 2, 2]
    assert json.loads((folder / "result.json").read_text())["steps"] == 110
    alone = task.run("train.epochs=40", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 110
    # Rounding grows from step to step.
    expected = dict(read_losses(task.folder / "alone"))
    assert dict(read_losses(folder)) == pytest.approx(expected, rel=1e-3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def world_sizes(folder: Path) -> list[int]:
    """Return the world size of each start of the run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["world_size"] for line in lines if "world_size" in line]


def wait_for_processes(folder: Path, counts: list[int], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while world_sizes(folder) != counts:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rank_of(launcher: int) -> int:
    """The process that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = [c for c in children if b"finesight" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return int(ranks[-1])
