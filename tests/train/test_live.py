"""The page of a run that goes on: it comes by itself, costs little, and tells how the run ended."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import START, MadeRun, step_line
from small_run import Task

from finesight.errors import Interrupted
from finesight.storage import Disk, using
from finesight.train import live
from finesight.train.budget import Budget
from finesight.train.checkpoint import Progress
from finesight.train.live import LEAST_REST, LivePage
from finesight.train.progress import Screen
from finesight.train.run import Run

PATIENCE = 30.0
PROGRESS = Progress(Budget(pack_tokens=100, recompute=0.0))


class Counting(Disk):
    """A disk that keeps every version of a report."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "report.html":
            self.pages.append(source.read_text())
        super().rename(source, target)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = MadeRun(tmp_path / "run")
    made.lines("metrics.jsonl", [START, *map(step_line, range(1, 9))])
    return Run(made.folder)


def page_of(run: Run, every: float) -> LivePage:
    return LivePage(run, Screen(Console(file=io.StringIO())), every)


def test_pages_come_by_themselves_and_show_the_newest(run: Run) -> None:
    with using(disk := Counting()):
        page = page_of(run, 0.001)
        with page.going(PROGRESS):
            run.note(step_line(9))
            end = time.monotonic() + PATIENCE
            while not any("step 9 of 60" in text for text in disk.pages):
                assert time.monotonic() < end, f"{len(disk.pages)} pages, none of step 9"
                time.sleep(0.01)
        written = len(disk.pages)
    assert "The run goes on: " in disk.pages[-1]
    time.sleep(0.05)
    assert len(disk.pages) == written, "a page after the end"


def test_a_page_that_took_long_is_followed_by_a_long_rest(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a three-hundredth of the time goes into pages."""

    def slow(*rest: object) -> None:
        start = time.thread_time()
        while time.thread_time() - start < 0.05:
            pass

    monkeypatch.setattr(live, "report", slow)
    page = page_of(run, 0.001)
    with page.going(PROGRESS):
        end = time.monotonic() + PATIENCE
        while page.again < 0.05 * LEAST_REST:
            assert time.monotonic() < end, page.again
            time.sleep(0.01)


def test_a_run_that_fails_says_so(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: object) -> None:
        raise ValueError("a fault of <ours>")

    monkeypatch.setattr("finesight.train.loop.take_step", broken)
    with pytest.raises(ValueError, match="a fault of <ours>"):
        task.run()
    page = (task.folder / "run" / "report.html").read_text()
    assert "The run failed after step 0 of 6." in page
    assert "ValueError: a fault of &lt;ours&gt;" in page
    monkeypatch.undo()
    assert task.run(resume=True).steps == 6
    assert 'role="status"' not in (task.folder / "run" / "report.html").read_text()


def test_a_run_that_is_interrupted_says_so(task: Task) -> None:
    class Stopping(Counting):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), 15)

    with using(disk := Stopping()), pytest.raises(Interrupted):
        task.run()
    assert "The run was interrupted after step " in disk.pages[-1]
    assert "stopped by SIGTERM" in disk.pages[-1]
    last = task.history()[-1]
    assert (last["how"], last["step"] >= 2) == ("interrupted", True)
