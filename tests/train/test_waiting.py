"""The time in which the device has nothing to do because data is late: measured, said, noted."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import Task

from finesight.train import waiting
from finesight.train.loader import Step
from finesight.train.progress import Screen
from finesight.train.waiting import Wait, awaited

CPU = torch.device("cpu")


def empty_steps(count: int) -> Iterator[Step]:
    return (Step(number, (), (), ()) for number in range(count))


def test_a_cpu_waits_for_as_long_as_its_process_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def late(seconds: list[float]) -> Iterator[Step]:
        nonlocal now
        for step, blocked in zip(empty_steps(3), seconds, strict=True):
            now += blocked
            yield step

    monkeypatch.setattr(waiting, "time", SimpleNamespace(perf_counter=lambda: now))
    found = []
    for step, wait in awaited(late([2.0, 0.5, 0.0]), CPU):
        now += 7.0  # learning
        found.append((step.number, wait.seconds))
    assert found == [(0, 2.0), (1, 0.5), (2, 0.0)]


class Event:
    """One of a GPU, by its time in milliseconds."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.mark.parametrize(
    ("blocked", "came", "expected"),
    [
        pytest.param(0.5, 1000.01, 0.0, id="busy all along"),
        pytest.param(0.5, 1200.0, 0.2, id="done on the way"),
        pytest.param(0.5, 1500.1, 0.5, id="idle from the start"),
        pytest.param(0.001, 1050.0, 0.001, id="idle for another reason"),
    ],
)
def test_a_gpu_waits_once_it_has_done_what_was_queued(
    blocked: float, came: float, expected: float
) -> None:
    events: Any = Event(1000.0), Event(came)
    assert Wait(blocked, *events).seconds == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("busy", [False, True])
def test_on_a_gpu(busy: bool) -> None:
    def late() -> Iterator[Step]:
        for step in empty_steps(3):
            time.sleep(0.05)
            yield step

    waits = []
    for _, wait in awaited(late(), torch.device("cuda")):
        waits.append(wait)
        if busy:
            # About a second, by the clock of the card, that the next data may take to come.
            torch.cuda._sleep(2_000_000_000)
    torch.cuda.synchronize()
    # Nothing is queued before the first.
    for wait in waits[1:]:
        assert wait.blocked >= 0.05
        assert (wait.seconds >= 0.04) is not busy


def test_a_run_notes_it_for_each_step(task: Task) -> None:
    task.run()
    lines = [line for line in task.history() if "loss" in line]
    assert len(lines) == 6
    assert all(0 < line["waited_s"] < line["seconds"] for line in lines)


def shown(waits: list[float]) -> list[str]:
    """Lines of a log, of steps of a second each."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200))
    figures = {
        "loss": 1.0,
        "samples_per_s": 16.0,
        "tokens_per_s": 900.0,
        "utilisation": None,
        "memory_gb": 1.0,
        "seconds": 1.0,
    }
    with screen.steps(len(waits), 0) as view:
        for step, waited in enumerate(waits, 1):
            view.show(figures | {"step": step, "waited_s": waited})
    return out.getvalue().splitlines()


def test_the_screen_says_it_where_it_matters() -> None:
    # Not of the first step, for which the readers have to start.
    assert all("waiting" not in line for line in shown([0.9, 0.01, 0.02, 0.03]))
    lines = shown([0.9, 0.0, 0.3, 0.6])
    assert ["waiting" in line for line in lines] == [False, False, True, True]
    assert "1.0 GB  15 % waiting for data" in lines[2]
    assert "30 % waiting for data" in lines[3]
