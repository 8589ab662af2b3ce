"""Runs killed at random points, and power loss; resumed runs must be bit-identical."""

import io
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from crash_disk import CrashingDisk, PowerLossDisk
from rich.console import Console
from tiny_task import TinyTask, assert_same_run, write_recipe

from finesight import storage
from finesight.recipe import load_recipe
from finesight.train.training_run import train

SETTINGS = {"save_every": 1, "epochs": 4}


def start_or_resume(task: TinyTask, name: str, disk: storage.FileSystem | None = None) -> int:
    """Start a child that begins or resumes the run."""
    child = os.fork()
    if child == 0:
        try:
            recipe = task.recipe | {"output_dir": str(task.folder / name)}
            path = write_recipe(task.folder / f"{os.getpid()}.yaml", recipe, **SETTINGS)
            with storage.use_file_system(disk or storage.FileSystem()):
                train(load_recipe(path), resume=True, console=Console(file=io.StringIO()))
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ending(child: int) -> str:
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


class UninterruptedRun(NamedTuple):
    task: TinyTask
    run: Path
    seconds: float


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRun:
    torch.set_num_threads(1)
    task = TinyTask(tmp_path_factory.mktemp("kills") / "task")
    start = time.perf_counter()
    assert ending(start_or_resume(task, "whole")) == "exit 0"
    return UninterruptedRun(task, task.folder / "whole", time.perf_counter() - start)


def test_killed_run_resumes_bit_exactly(uninterrupted: UninterruptedRun, every_point: bool) -> None:
    """Kill a run repeatedly; final weights, optimizer state and losses are bit-identical."""
    task, expected, seconds = uninterrupted
    wanted = 50 if every_point else 4
    kills, ends, rng = 0, 0, random.Random(0)
    while kills < wanted:
        child = start_or_resume(task, f"run{ends}")
        time.sleep(rng.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        how = ending(child)
        assert how in ("killed", "exit 0")
        kills += how == "killed"
        if how == "exit 0":
            assert_same_run(task.folder / f"run{ends}", expected)
            ends += 1
    assert ending(start_or_resume(task, f"run{ends}")) == "exit 0"
    assert_same_run(task.folder / f"run{ends}", expected)


def test_crash_at_operation_resumes_bit_exactly(
    uninterrupted: UninterruptedRun, every_point: bool
) -> None:
    """Breaks: the process, or the power, at an operation of a run. Survive: all bits, and every
    step and measurement of the metrics. Takes long: each operation is a run."""
    task, expected, _ = uninterrupted
    # Processes die at some operations in tests/invariants/test_resume.py, too.
    for crash in ("power", "process") if every_point else ("power",):
        deaths = 0
        for last in range(1, 1000, 7 if every_point else 131):
            home = task.folder / f"{crash}{last}"
            home.mkdir()
            disk = PowerLossDisk(last, home) if crash == "power" else CrashingDisk(last)
            how = ending(start_or_resume(task, f"{home.name}/run", disk))
            if how == "exit 0":
                break
            assert how == "killed"
            deaths += 1
            assert ending(start_or_resume(task, f"{home.name}/run")) == "exit 0"
            assert_same_run(home / "run", expected)
            assert read_evaluations(home / "run") == read_evaluations(expected)
        assert how == "exit 0"
        assert deaths > 1


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
