"""Runs with worker processes that are killed and restarted at once, as a supervisor does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_task import TinyTask, read_losses, write_recipe

from finesight.train.run_dir import RunDir

GUARD = 120.0
"""Seconds after which a test fails instead of hanging."""


def start(recipe: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start the command, with its output in a file next to the recipe."""
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *options]
    with recipe.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait_for_steps(recipe: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has noted `count` further steps."""
    run, end = recipe.parent / "run", time.monotonic() + GUARD
    fewest = last = len(read_losses(run))
    while last < fewest + count:
        output = recipe.with_suffix(".log").read_text()
        assert process.poll() is None, output
        assert time.monotonic() < end, output
        time.sleep(0.02)
        last = len(read_losses(run))
        # A resumed run cuts off the steps after its checkpoint.
        fewest = min(fewest, last)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def running(pids: list[int]) -> list[int]:
    """The processes that have not ended."""
    return [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]


@pytest.fixture
def recipe(task: TinyTask) -> Path:
    """A long run with two data loader workers, a tracker, and a validation after each step."""
    output = {"output_dir": str(task.folder / "run"), "track": [{"kind": "tensorboard"}]}
    settings = {"num_workers": 2, "epochs": 2000, "save_every": 1}
    return write_recipe(task.folder / "recipe.yaml", task.recipe | output, **settings)


def test_run_is_unlocked_when_its_process_is_killed(recipe: Path) -> None:
    """Kill only the training process; the lock is released, and no worker remains."""
    process = start(recipe)
    wait_for_steps(recipe, 2, process)
    started = children(process.pid)
    process.kill()
    process.wait()
    try:
        with RunDir(recipe.parent / "run").lock():
            pass
        end = time.monotonic() + GUARD
        while running(started) and time.monotonic() < end:
            time.sleep(0.02)
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running(started)]
        assert not commands
    finally:
        for pid in running(started):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.fuzz
def test_supervisor_restarts_a_killed_run_twenty_times(recipe: Path) -> None:
    """Breaks: the training process, twenty times. Survives: every restart with `--resume`."""
    for kills in range(20):
        process = start(recipe, *(["--resume"] if kills else []))
        wait_for_steps(recipe, 2, process)
        process.kill()
        process.wait()
        with RunDir(recipe.parent / "run").lock():
            pass
