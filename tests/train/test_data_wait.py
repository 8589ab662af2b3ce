"""Measurement and display of the data wait."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from finesight.train import dataloader
from finesight.train.console import TrainingConsole
from finesight.train.dataloader import DataWait, StepBatch, time_data_waits

CPU = torch.device("cpu")


def empty_steps(count: int) -> Iterator[StepBatch]:
    return (StepBatch(number, (), (), ()) for number in range(count))


def test_cpu_wait_is_blocked_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def late(seconds: list[float]) -> Iterator[StepBatch]:
        nonlocal now
        for step, blocked in zip(empty_steps(3), seconds, strict=True):
            now += blocked
            yield step

    monkeypatch.setattr(dataloader, "time", SimpleNamespace(perf_counter=lambda: now))
    found = []
    for step, wait in time_data_waits(late([2.0, 0.5, 0.0]), CPU):
        now += 7.0  # learning
        found.append((step.step_index, wait.seconds))
    assert found == [(0, 2.0), (1, 0.5), (2, 0.0)]


class FakeEvent:
    """One of a GPU, by its time in milliseconds."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, other: FakeEvent) -> float:
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
def test_gpu_wait_starts_after_queued_work(blocked: float, came: float, expected: float) -> None:
    events: Any = FakeEvent(1000.0), FakeEvent(came)
    assert DataWait(blocked, *events).seconds == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("busy", [False, True])
def test_gpu_wait_measurement(busy: bool) -> None:
    def late() -> Iterator[StepBatch]:
        for step in empty_steps(3):
            time.sleep(0.05)
            yield step

    waits = []
    for _, wait in time_data_waits(late(), torch.device("cuda")):
        waits.append(wait)
        if busy:
            # About a second, by the clock of the card, that the next data may take to come.
            torch.cuda._sleep(2_000_000_000)
    torch.cuda.synchronize()
    # Nothing is queued before the first.
    for wait in waits[1:]:
        assert wait.blocked_s >= 0.05
        assert (wait.seconds >= 0.04) is not busy


def logged_lines(waits: list[float]) -> list[str]:
    """Lines of a log, of steps of a second each."""
    out = io.StringIO()
    screen = TrainingConsole(Console(file=out, width=200))
    figures = {
        "loss": 1.0,
        "samples_per_s": 16.0,
        "tokens_per_s": 900.0,
        "mfu": None,
        "peak_memory_gb": 1.0,
        "step_s": 1.0,
    }
    with screen.step_progress(len(waits), 0) as view:
        for step, waited in enumerate(waits, 1):
            view.update(figures | {"step": step, "data_wait_s": waited})
    return out.getvalue().splitlines()


def test_console_shows_significant_data_wait() -> None:
    # Not of the first step, for which the readers have to start.
    assert all("waiting" not in line for line in logged_lines([0.9, 0.01, 0.02, 0.03]))
    lines = logged_lines([0.9, 0.0, 0.3, 0.6])
    assert ["waiting" in line for line in lines] == [False, False, True, True]
    assert "  peak 1.0 GB  15 % waiting for data" in lines[2]
    assert "30 % waiting for data" in lines[3]
