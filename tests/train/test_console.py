"""Progress of stages on a terminal and in a log."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from finesight.train import console
from finesight.train.console import TrainingConsole


@pytest.mark.parametrize(
    ("step_s", "lines"),
    [
        (1.0, ["reading: 10/30, 20 s left", "reading: 20/30, 10 s left", "reading: 30/30"]),
        # The first sample includes the warm-up.
        (
            25.0,
            [
                "reading: 1/30",
                *(f"reading: {n}/30, {25 * (30 - n)} s left" for n in range(2, 30)),
                "reading: 30/30",
            ],
        ),
        (0.1, []),
    ],
    ids=["every-ten-seconds", "slow", "fast"],
)
def test_log_has_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, step_s: float, lines: list[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    output = io.StringIO()
    with TrainingConsole(Console(file=output)).progress_stage("reading", 30) as on_progress:
        on_progress(0)
        for _ in range(30):
            now += step_s
            on_progress(1)
    assert output.getvalue().splitlines() == lines


def test_terminal_shows_remaining_time() -> None:
    output = io.StringIO()
    terminal = TrainingConsole(Console(file=output, force_terminal=True, width=100))
    with terminal.progress_stage("reading", 4) as on_progress:
        on_progress(2)
        time.sleep(0.01)
    with terminal.activity("saving"):
        pass
    assert "reading" in output.getvalue()
    assert "4/4" not in output.getvalue()
    assert "2/4" in output.getvalue()
    assert "0:00:0" in output.getvalue()
    assert "saving" in output.getvalue()


@pytest.mark.parametrize(("interval_s", "lines"), [(0.01, ["saving ...", "saving: 0 s"]), (10, [])])
def test_activity_is_logged_if_long(
    monkeypatch: pytest.MonkeyPatch, interval_s: float, lines: list[str]
) -> None:
    monkeypatch.setattr(console, "LOG_INTERVAL_S", interval_s)
    output = io.StringIO()
    with TrainingConsole(Console(file=output)).activity("saving"):
        time.sleep(0.1)
    assert output.getvalue().splitlines() == lines
