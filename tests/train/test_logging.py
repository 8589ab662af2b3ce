"""What a run notes of itself, and the page that is made of it on the way and at the end."""

from __future__ import annotations

import io
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from case_files import load_cases
from rich.console import Console
from run_dir_fixtures import START_RECORD, FakeRunDir, make_step_line
from tiny_task import TinyTask

from finesight.errors import TrainingInterrupted
from finesight.storage import FileSystem, use_file_system
from finesight.train import finalize
from finesight.train.checkpoint import TrainProgress
from finesight.train.console import TrainingConsole
from finesight.train.evaluation import EvalResult
from finesight.train.finalize import MIN_IDLE_RATIO, LiveReport, write_run_report
from finesight.train.logging import MIN_LOSS_WINDOW, TrackingEvents, get_device_name, is_loss_spike
from finesight.train.oom import MemoryBudget
from finesight.train.run_dir import RunDir
from finesight.train.trainer import TrainState

CASES = load_cases("logging")

PATIENCE = 30.0
PROGRESS = TrainProgress(MemoryBudget(pack_tokens=100, activation_checkpointing=0.0))
METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}


class HistoryFileSystem(FileSystem):
    """A disk that keeps every version of a report, and may refuse to take one."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.pages: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "report.html":
            if self.refuse:
                raise RuntimeError("a fault of the report's own")
            self.pages.append(source.read_text())
        super().rename(source, target)


def read_status(page: str) -> str:
    """Return the run status of a report page."""
    found = re.search(r"The run is ([^.]+)\.", page)
    assert found is not None, "the page does not say where the run stands"
    return found[1]


def test_report_at_every_evaluation_and_at_the_end(task: TinyTask) -> None:
    with use_file_system(disk := HistoryFileSystem()):
        task.run(eval=METRIC)
    assert [read_status(page) for page in disk.pages] == [
        *(f"not finished: {step} of 6 steps so far" for step in (0, 2, 4)),
        "finished after 6 steps",
    ]
    assert f"Report:  {task.folder / 'run' / 'report.html'}" in task.console_output
    last = disk.pages[-1]
    assert "3 validation samples" in last
    assert (
        "11 samples, 2 epochs: language with LoRA of rank 4; merger with full fine-tuning" in last
    )
    assert '"problem"' not in last, "every image was found"


def test_interrupted_run_has_a_report(task: TinyTask) -> None:
    class Stopping(HistoryFileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), 15)

    with use_file_system(disk := Stopping()), pytest.raises(TrainingInterrupted):
        task.run(eval={"metric": "ocr", "max_new_tokens": 4})
    assert "not finished: " in disk.pages[0]
    assert "The run was interrupted after step " in disk.pages[-1]
    assert "stopped by SIGTERM" in disk.pages[-1]
    last = task.read_metrics()[-1]
    assert (last["status"], last["step"] >= 2) == ("interrupted", True)
    task.run(resume=True, eval={"metric": "ocr", "max_new_tokens": 4})
    page = (task.folder / "run" / "report.html").read_text()
    assert read_status(page) == "finished after 6 steps"
    starts = [line for line in task.read_metrics() if "started_at" in line]
    assert len(starts) == 2
    assert starts[0]["step"] == 0


def test_run_survives_report_errors(task: TinyTask) -> None:
    with use_file_system(HistoryFileSystem(refuse=True)):
        result = task.run(eval=METRIC)
    assert result.steps == 6
    assert (
        task.console_output.count(
            "writing the report failed (RuntimeError: a fault of the report's"
        )
        == 4
    )
    assert f"`finesight report {task.folder / 'run'}` creates it later" in task.console_output
    assert not (task.folder / "run" / "report.html").exists()


def test_user_file_is_not_overwritten(task: TinyTask) -> None:
    run = task.rewind_to_checkpoint()
    (run / "report.html").write_text("precious")
    assert task.run(resume=True).steps == 6
    assert "exists and is not a page of finesight" in task.console_output
    assert (run / "report.html").read_text() == "precious"


def test_missing_report_is_written_on_resume(task: TinyTask) -> None:
    task.run()
    page = task.folder / "run" / "report.html"
    page.unlink()
    task.run(resume=True)
    assert read_status(page.read_text()) == "finished after 6 steps"


def test_no_report_without_run(tmp_path: Path) -> None:
    shown = io.StringIO()
    write_run_report(RunDir(tmp_path), TrainingConsole(Console(file=shown, width=200)))
    assert "writing the report failed (UserError: " in shown.getvalue()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def history(task: TinyTask) -> list[dict[str, Any]]:
    task.run(eval=METRIC)
    return task.read_metrics()


def test_start_record_has_versions_and_devices(history: list[dict[str, Any]]) -> None:
    start = history[0]
    assert (start["step"], start["total_steps"], start["num_workers"]) == (0, 6, 0)
    assert start["precision"] == "fp32"
    assert start["versions"]["torch"] == torch.__version__
    assert start["data"]["train"]["num_samples"] == 11
    assert start["data"]["eval"]["num_samples"] == 3
    assert len(start["data"]["train"]["fingerprint"]) == 64
    assert sum(start["size_histograms"]["tokens"].values()) == 11
    assert sum(start["size_histograms"]["patches"].values()) == 11
    assert Path(start["working_dir"]) == Path.cwd()
    assert start["setup_s"] > 0
    json.dumps(start, allow_nan=False)


def test_evaluation_records_have_durations(history: list[dict[str, Any]]) -> None:
    seconds = [line["eval_s"] for line in history if "validation_loss" in line]
    assert len(seconds) == 4
    assert all(value > 0 for value in seconds)


def test_cpu_device_name() -> None:
    assert f"{torch.get_num_threads()} threads" in get_device_name(torch.device("cpu"))


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


CALM = [2.0 + 0.1 * math.sin(number) for number in range(64)]


def test_outlier_loss_is_a_jump() -> None:
    assert is_loss_spike(20.0, CALM)
    assert is_loss_spike(4.3, CALM)


def test_small_fluctuations_are_no_jump() -> None:
    assert not is_loss_spike(2.2, CALM)
    assert not is_loss_spike(3.9, CALM)
    noisy = [0.1 * 2 ** (number % 6) for number in range(64)]
    assert not is_loss_spike(3.2, noisy)


def test_few_losses_give_no_jump() -> None:
    assert not is_loss_spike(20.0, CALM[: MIN_LOSS_WINDOW - 1])
    assert is_loss_spike(20.0, CALM[:MIN_LOSS_WINDOW])


def test_new_loss_level_stops_being_a_jump() -> None:
    high = [20.0 + number % 5 for number in range(40)]
    assert is_loss_spike(20.0, [*CALM[:30], *high[:10]])
    assert not is_loss_spike(20.0, [*CALM[:20], *high])


class Recorder:
    """Tracker manager that records all calls."""

    is_active = True

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.records.append(("figures", step, values))

    def log_images(self, step: int, images: list[Any]) -> None:
        self.records.append(("images", step, len(images)))

    def send_alert(self, level: str, title: str, text: str) -> None:
        self.records.append((level, title, text))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def tracking_events(tmp_path: Path, recorder: Recorder) -> TrackingEvents:
    session = cast(TrainState, SimpleNamespace(run_dir=RunDir(tmp_path)))
    return TrackingEvents(session, cast(Any, recorder))


STEP = {"step": 7, "loss": 2.5, "lr": {"language": 1e-4}, "num_samples": 16, "grad_norm": None}


def test_step_metrics(tracking_events: TrackingEvents, recorder: Recorder) -> None:
    tracking_events.log_step(STEP | {"nonfinite_samples": [], "loss_spike_samples": []})
    assert recorder.records == [("figures", 7, {"loss": 2.5, "learning_rate/language": 1e-4})]


@pytest.mark.parametrize(
    ("name", "title", "text"), CASES["test_skipped_step_and_loss_jump_send_alerts"]
)
def test_skipped_step_and_loss_jump_send_alerts(
    tracking_events: TrackingEvents, recorder: Recorder, name: str, title: str, text: str
) -> None:
    tracking_events.log_step(
        STEP | {"nonfinite_samples": (), "loss_spike_samples": ()} | {name: ("train.jsonl:3",)}
    )
    assert recorder.records[1:] == [("warning", title, text)]


@pytest.mark.parametrize(
    ("headline", "before", "now", "worse"),
    [
        ("f1", (0.5, 2.0), (0.4, 1.0), "f1 0.4000 after 4 steps, 0.5000 before"),
        ("f1", (0.5, 2.0), (0.5, 3.0), None),
        ("cer", (0.5, 2.0), (0.6, 1.0), "cer 0.6000 after 4 steps, 0.5000 before"),
        ("cer", (0.5, 2.0), (0.4, 3.0), None),
        (None, (0.5, 2.0), (0.4, 2.1), "validation_loss 2.1000 after 4 steps, 2.0000 before"),
        (None, (0.5, 2.0), (0.4, 1.9), None),
    ],
)
def test_worse_evaluation_sends_alert(
    tracking_events: TrackingEvents,
    recorder: Recorder,
    tmp_path: Path,
    headline: str | None,
    before: tuple[float, float],
    now: tuple[float, float],
    worse: str | None,
) -> None:
    first, second = (
        EvalResult(step, loss, {headline: score} if headline else {}, headline)
        for step, (score, loss) in ((0, before), (4, now))
    )
    RunDir(tmp_path).metrics_path.write_text(
        "".join(json.dumps(one.as_json()) + "\n" for one in (first, second))
    )
    full = replace(second, validation_loss=9.0)
    tracking_events.log_evaluation(replace(second, full=full), "step-4")
    scores = {f"scores/{headline}": now[0]} if headline else {}
    all_scores = {f"all_samples/{name}": score for name, score in scores.items()}
    assert recorder.records[:3] == [
        ("figures", 4, {"validation_loss": now[1], **scores}),
        ("figures", 4, {"all_samples/validation_loss": 9.0, **all_scores}),
        ("images", 4, 0),
    ]
    alerts = [] if worse is None else [("warning", "worse than before training", worse)]
    assert recorder.records[3:] == alerts
    # The evaluation of other samples is not compared.
    tracking_events.log_evaluation(replace(second, sample_set="0af1"), "step-4")
    assert len(recorder.records) == 5 + len(alerts)
