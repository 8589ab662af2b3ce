"""Progress of stages and steps on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from finesight.train import console
from finesight.train.console import TrainingConsole

EVERY_TEN_SECONDS = ["reading: 10/30, 20 s left", "reading: 20/30, 10 s left", "reading: 30/30"]
# The first sample includes the warm-up.
EVERY_SAMPLE = [
    "reading: 1/30",
    *(f"reading: {n}/30, {25 * (30 - n)} s left" for n in range(2, 30)),
    "reading: 30/30",
]


@pytest.mark.parametrize(
    ("step_s", "lines"), [(1.0, EVERY_TEN_SECONDS), (25.0, EVERY_SAMPLE), (0.1, [])]
)
def test_log_has_a_line_every_ten_seconds(monkeypatch, step_s, lines):
    now = 0.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    output = io.StringIO()
    with TrainingConsole(Console(file=output)).progress_stage("reading", 30) as on_progress:
        on_progress(0)
        for _ in range(30):
            now += step_s
            on_progress(1)
    assert output.getvalue().splitlines() == lines


def test_significant_data_wait_is_shown():
    for waits_s, percent in (((0.9, 0.01, 0.02, 0.03), {}), ((0.9, 0.0, 0.3, 0.6), {2: 15, 3: 30})):
        output = io.StringIO()
        metrics = {"loss": 1.0, "samples_per_s": 16.0, "tokens_per_s": 900.0, "mfu": None}
        metrics |= {"peak_memory_gb": 1.0, "step_s": 1.0}
        with TrainingConsole(Console(file=output, width=200)).step_progress(4, 0) as progress:
            for step, wait_s in enumerate(waits_s, 1):
                progress.update(metrics | {"step": step, "data_wait_s": wait_s})
        for number, line in enumerate(output.getvalue().splitlines()):
            expected = f"  peak 1.0 GB  {percent.get(number)} % waiting for data"
            assert (expected in line) == ("waiting" in line) == (number in percent)
