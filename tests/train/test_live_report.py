"""Live report: periodic updates, low cost and the end status."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from run_dir_fixtures import START_RECORD, FakeRunDir, make_step_line
from tiny_task import TinyTask

from finesight.errors import TrainingInterrupted
from finesight.storage import FileSystem, use_file_system
from finesight.train import finalize
from finesight.train.checkpoint import TrainProgress
from finesight.train.console import TrainingConsole
from finesight.train.finalize import MIN_IDLE_RATIO, LiveReport
from finesight.train.oom import MemoryBudget
from finesight.train.run_dir import RunDir

PATIENCE = 30.0
PROGRESS = TrainProgress(MemoryBudget(pack_tokens=100, activation_checkpointing=0.0))


class HistoryFileSystem(FileSystem):
    """File system that stores every version of a report."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "report.html":
            self.pages.append(source.read_text())
        super().rename(source, target)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = FakeRunDir(tmp_path / "run")
    made.write_lines("metrics.jsonl", [START_RECORD, *map(make_step_line, range(1, 9))])
    return RunDir(made.folder)


def page_of(run: RunDir, every: float) -> LiveReport:
    return LiveReport(run, TrainingConsole(Console(file=io.StringIO())), every)


def test_live_report_shows_newest_progress(run: RunDir) -> None:
    with use_file_system(disk := HistoryFileSystem()):
        page = page_of(run, 0.001)
        with page.run_in_background(PROGRESS):
            run.append_metrics(make_step_line(9))
            end = time.monotonic() + PATIENCE
            while not any("step 9 of 60" in text for text in disk.pages):
                assert time.monotonic() < end, f"{len(disk.pages)} pages, none of step 9"
                time.sleep(0.01)
        written = len(disk.pages)
    assert "The run is in progress: " in disk.pages[-1]
    time.sleep(0.05)
    assert len(disk.pages) == written, "a page after the end"


def test_slow_report_lowers_the_update_rate(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates take at most 1/300 of the time."""

    def slow(*rest: object, **options: object) -> None:
        start = time.thread_time()
        while time.thread_time() - start < 0.05:
            pass

    monkeypatch.setattr(finalize, "write_run_report", slow)
    page = page_of(run, 0.001)
    with page.run_in_background(PROGRESS):
        end = time.monotonic() + PATIENCE
        while page.interval_s < 0.05 * MIN_IDLE_RATIO:
            assert time.monotonic() < end, page.interval_s
            time.sleep(0.01)


def test_failed_run_reports_its_error(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: object) -> None:
        raise ValueError("a fault of <ours>")

    monkeypatch.setattr("finesight.train.trainer.train_step", broken)
    with pytest.raises(ValueError, match="a fault of <ours>"):
        task.run()
    page = (task.folder / "run" / "report.html").read_text()
    assert "The run failed after step 0 of 6." in page
    assert "ValueError: a fault of &lt;ours&gt;" in page
    monkeypatch.undo()
    assert task.run(resume=True).steps == 6
    assert 'role="status"' not in (task.folder / "run" / "report.html").read_text()


def test_interrupted_run_reports_it(task: TinyTask) -> None:
    class Stopping(HistoryFileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), 15)

    with use_file_system(disk := Stopping()), pytest.raises(TrainingInterrupted):
        task.run()
    assert "The run was interrupted after step " in disk.pages[-1]
    assert "stopped by SIGTERM" in disk.pages[-1]
    last = task.read_metrics()[-1]
    assert (last["status"], last["step"] >= 2) == ("interrupted", True)
