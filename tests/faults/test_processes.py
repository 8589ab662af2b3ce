"""Processes that die, hang or are told to stop: readers, one of several that learn, the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import Task, final_files, losses, write_recipe

from finesight.digests import verify_folder
from finesight.train import loop
from finesight.train.loader import Step
from finesight.train.prepare import Session
from finesight.train.step import Taken

TESTS = Path(__file__).parents[1]


def until(come: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for it, as long as the process lives."""
    while not come():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_a_reader_that_is_killed_is_started_again(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks: the reading process of a run, twice. Survive: every sample, in its step: the same
    bits as a run whose readers lived."""
    settings = ("train.workers=1", "train.epochs=4", "train.save_every=30")
    task.run(*settings, name="whole")
    real = loop.take_step

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number in (1, 5):
            (reader,) = multiprocessing.active_children()
            reader.kill()
            reader.join()
        return real(session, step, *rest)

    monkeypatch.setattr(loop, "take_step", taking)
    task.run(*settings)
    assert sum("is started again" in message for message in caplog.messages) == 2
    assert final_files(task.folder / "run") == final_files(task.folder / "whole")
    assert losses(task.folder / "run") == losses(task.folder / "whole")


def several(task: Task, count: int) -> list[subprocess.Popen[str]]:
    """Processes that learn together, without a launcher that would end the others."""
    recipe = task.recipe | {"output": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, epochs=500)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "hanging.py"), str(path)],
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def test_a_process_that_hangs_is_named(task: Task) -> None:
    """Breaks: one of two processes, at any moment of a step. Survives: a checkpoint of the last
    step; the error says which process it was."""
    first, second = several(task, 2)
    try:
        until(lambda: len(losses(task.folder / "run")) > 2, first)
        second.send_signal(signal.SIGSTOP)
        said, _ = first.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
        first.kill()
    assert first.returncode == 2, said
    assert "process 1 of 2 has not answered for 0:00:03" in said
    last = max(step for step, _ in losses(task.folder / "run"))
    verify_folder(task.folder / "run" / "checkpoints" / f"step-{last}")


def test_a_scheduler_that_asks_to_stop_gets_a_checkpoint(task: Task, every: bool) -> None:
    """Breaks: a job's time is over. Survive: a checkpoint of the last step, and exit code 75."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)[: 3 if every else 1]:
        run = task.folder / number.name
        recipe = task.recipe | {"output": str(run)}
        path = write_recipe(task.folder / "recipe.yaml", recipe, epochs=500)
        process = subprocess.Popen(
            [sys.executable, "-m", "finesight", "train", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until(lambda run=run: len(losses(run)) > 2, process)
        process.send_signal(number)
        said, _ = process.communicate()
        assert process.returncode == 75, said
        last = max(step for step, _ in losses(run))
        assert f"stopped by {number.name}, checkpoint of step {last} written" in said
        verify_folder(run / "checkpoints" / f"step-{last}")
