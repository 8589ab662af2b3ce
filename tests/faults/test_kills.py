"""Whole runs killed at any moment, and machines without power: what goes on ends with the same
bits."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from dying_disk import DyingDisk, PowerCut
from rich.console import Console
from small_run import Task, final_files, losses, write_recipe

from finesight import storage
from finesight.recipe import load_recipe
from finesight.train.loop import train

SETTINGS = {"save_every": 1, "epochs": 4}


def going_on(task: Task, name: str, disk: storage.Disk | None = None) -> int:
    """A child that begins the run or goes on with it."""
    child = os.fork()
    if child == 0:
        try:
            recipe = task.recipe | {"output": str(task.folder / name)}
            path = write_recipe(task.folder / f"{os.getpid()}.yaml", recipe, **SETTINGS)
            with storage.using(disk or storage.Disk()):
                train(load_recipe(path), resume=True, console=Console(file=io.StringIO()))
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ending(child: int) -> str:
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


@pytest.fixture
def whole(task: Task) -> Path:
    torch.set_num_threads(1)
    assert ending(going_on(task, "whole")) == "exit 0"
    return task.folder / "whole"


def assert_same(run: Path, whole: Path) -> None:
    expected, found = final_files(whole), final_files(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert losses(run) == losses(whole)


def test_killed_at_fifty_random_moments(task: Task, whole: Path, every: bool) -> None:
    """Breaks: SIGKILL at any moment of a run, and again after it went on. Survive: all bits of the
    last weights and moments, and the loss of every step."""
    wanted = 50 if every else 4
    kills, ends, rng = 0, 0, random.Random(0)
    start = time.perf_counter()
    assert ending(going_on(task, "timed")) == "exit 0"
    length = time.perf_counter() - start
    while kills < wanted:
        child = going_on(task, f"run{ends}")
        time.sleep(rng.uniform(0.0, length))
        os.kill(child, signal.SIGKILL)
        how = ending(child)
        assert how in ("killed", "exit 0")
        kills += how == "killed"
        if how == "exit 0":
            assert_same(task.folder / f"run{ends}", whole)
            ends += 1
    assert ending(going_on(task, f"run{ends}")) == "exit 0"
    assert_same(task.folder / f"run{ends}", whole)


def test_a_run_dies_at_an_operation(task: Task, whole: Path, every: bool) -> None:
    """Breaks: the process, or the power, at an operation of a run. Survive: all bits, and every
    step and measurement of the metrics."""
    # Processes die at some operations in tests/invariants/test_resume.py, too.
    for crash in ("power", "process") if every else ("power",):
        deaths = 0
        for last in range(1, 1000, 7 if every else 131):
            home = task.folder / f"{crash}{last}"
            home.mkdir()
            disk = PowerCut(last, home) if crash == "power" else DyingDisk(last)
            how = ending(going_on(task, f"{home.name}/run", disk))
            if how == "exit 0":
                break
            assert how == "killed"
            deaths += 1
            assert ending(going_on(task, f"{home.name}/run")) == "exit 0"
            assert_same(home / "run", whole)
            assert measured(home / "run") == measured(whole)
        assert how == "exit 0"
        assert deaths > 1


def measured(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
