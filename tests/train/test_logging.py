"""Records of a run: metrics, tracking events, and the report during the run and at its end."""

import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from run_dir_fixtures import START_RECORD, FakeRunDir, make_step_line

from finesight import progress as console_module
from finesight.errors import TrainingInterrupted
from finesight.evaluate.eval_result import EvalResult
from finesight.files import storage
from finesight.files.storage import FileSystem
from finesight.progress import ProgressConsole
from finesight.train.logging import MIN_LOSS_WINDOW, TrackingEvents, is_loss_spike
from finesight.train.run_dir import RunDir
from finesight.train.run_report import RunReport

METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}


class HistoryFileSystem(FileSystem):
    """File system that keeps every version of a report, or refuses to write it."""

    def __init__(self, refuse: bool = False, stop_at: str = "") -> None:
        self.refuse, self.stop_at = refuse, stop_at
        self.pages: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "report.html":
            if self.refuse:
                raise RuntimeError("a fault of the report's own")
            self.pages.append(source.read_text())
        super().rename(source, target)
        if target.name == self.stop_at:
            os.kill(os.getpid(), 15)


def read_status(page: str) -> str:
    found = re.search(r"The run is ([^.]+)\.", page)
    assert found is not None, "the page does not contain the status of the run"
    return found[1]


def test_report_at_every_evaluation_and_at_the_end(task):
    with patch.object(storage, "file_system", disk := HistoryFileSystem()):
        task.run(eval=METRIC)
    expected = [f"not finished: {step} of 6 steps so far" for step in (0, 2, 4)]
    assert [read_status(page) for page in disk.pages] == [*expected, "finished after 6 steps"]
    page = task.folder / "run" / "report.html"
    assert f"Report:  {page}" in task.console_output
    for text in ("3 validation samples", "11 samples, 2 epochs: language with LoRA of rank 4"):
        assert text in disk.pages[-1]
    assert '"problem"' not in disk.pages[-1], "every image was found"
    metrics = task.read_metrics()
    start = metrics[0]
    assert (start["step"], start["total_steps"], start["num_workers"]) == (0, 6, 0)
    assert (start["precision"], start["versions"]["torch"]) == ("fp32", torch.__version__)
    assert f"{torch.get_num_threads()} threads" in start["device"]
    assert [start["data"][split]["num_samples"] for split in ("train", "eval")] == [11, 3]
    assert len(start["data"]["train"]["fingerprint"]) == 64
    assert [sum(one.values()) for one in start["size_histograms"].values()] == [11, 11]
    assert Path(start["working_dir"]) == Path.cwd()
    assert start["setup_s"] > 0
    durations = [line["eval_s"] for line in metrics if "validation_loss" in line]
    assert len(durations) == 4
    assert all(seconds > 0 for seconds in durations)
    # A missing report is written again.
    page.unlink()
    task.run(eval=METRIC, resume=True)
    assert read_status(page.read_text()) == "finished after 6 steps"


def test_interrupted_run_has_a_report(task):
    task.recipe["eval"] = METRIC | {"every": None}
    disk = HistoryFileSystem(stop_at="step-2")
    with patch.object(storage, "file_system", disk), pytest.raises(TrainingInterrupted):
        task.run()
    assert "not finished: " in disk.pages[0]
    assert "The run was interrupted after step " in disk.pages[-1]
    assert "stopped by SIGTERM" in disk.pages[-1]
    last = task.read_metrics()[-1]
    assert (last["status"], last["step"] >= 2) == ("interrupted", True)
    task.run(resume=True)
    page = (task.folder / "run" / "report.html").read_text()
    assert read_status(page) == "finished after 6 steps"
    starts = [line["step"] for line in task.read_metrics() if "started_at" in line]
    assert (len(starts), starts[0]) == (2, 0)


def test_run_survives_report_errors(task):
    page = task.folder / "run" / "report.html"
    with patch.object(storage, "file_system", HistoryFileSystem(refuse=True)):
        assert task.run(eval=METRIC).steps == 6
    failure = "writing the report failed (RuntimeError: a fault of the report's"
    assert task.console_output.count(failure) == 4
    assert f"to create it later: finesight report {task.folder / 'run'}" in task.console_output
    assert not page.exists()
    page.write_text("precious")
    (page.parent / "result.json").unlink()
    task.run(eval=METRIC, resume=True)
    assert "exists, and is not an unchanged page of `finesight report`" in task.console_output
    assert page.read_text() == "precious"


def test_failed_run_reports_its_error(task, monkeypatch):
    def fail(*rest: object, **more: object) -> None:
        raise ValueError("a fault of <ours>")

    monkeypatch.setattr("finesight.train.trainer.train_step", fail)
    with pytest.raises(ValueError, match="a fault of <ours>"):
        task.run()
    page = task.folder / "run" / "report.html"
    assert "The run failed after step 0 of 6." in page.read_text()
    assert "ValueError: a fault of &lt;ours&gt;" in page.read_text()
    monkeypatch.undo()
    assert task.run(resume=True).steps == 6
    assert 'role="status"' not in page.read_text()


def test_live_report_is_written_at_most_once_per_interval(tmp_path):
    """Writing takes at most 1/300 of the time."""
    made = FakeRunDir(tmp_path / "run")
    made.write_lines("metrics.jsonl", [START_RECORD, *map(make_step_line, range(1, 9))])
    console = ProgressConsole(Console(file=io.StringIO()))
    report = RunReport(RunDir(made.folder), console, 1000.0)
    with patch.object(storage, "file_system", disk := HistoryFileSystem()):
        assert not report.write_if_due()
        report = RunReport(RunDir(made.folder), console, 0.0)
        RunDir(made.folder).append_metrics(make_step_line(9))
        assert [report.write_if_due() for _ in range(3)] == [True, False, False]
    (page,) = disk.pages
    assert "The run is in progress: " in page
    assert "step 9 of 60" in page


CALM = [2.0 + 0.1 * math.sin(number) for number in range(64)]
NOISY = [0.1 * 2 ** (number % 6) for number in range(64)]
HIGH = [20.0 + number % 5 for number in range(40)]


def test_loss_spike_is_above_the_recent_level():
    for loss, recent, is_spike in (
        (20.0, CALM, True),
        (4.3, CALM, True),
        (3.9, CALM, False),
        (2.2, CALM, False),
        (3.2, NOISY, False),
        (20.0, CALM[: MIN_LOSS_WINDOW - 1], False),
        (20.0, CALM[:MIN_LOSS_WINDOW], True),
        (20.0, [*CALM[:30], *HIGH[:10]], True),
        (20.0, [*CALM[:20], *HIGH], False),
    ):
        assert is_loss_spike(loss, recent) == is_spike


@pytest.fixture
def tracker() -> mock.Mock:
    return mock.Mock(is_active=True)


@pytest.fixture
def events(tmp_path: Path, tracker: mock.Mock) -> TrackingEvents:
    return TrackingEvents(RunDir(tmp_path), tracker)


@pytest.mark.parametrize(
    ("name", "alert"),
    [("", None), ("nonfinite_samples", "non-finite step"), ("loss_spike_samples", "loss spike")],
)
def test_steps_are_tracked(events, tracker, name, alert):
    metrics = {"step": 7, "loss": 2.5, "lr": {"language": 1e-4}, "num_samples": 16}
    metrics |= {"grad_norm": None, "nonfinite_samples": (), "loss_spike_samples": ()}
    events.log_step(metrics | {name: ("train.jsonl:3",)})
    tracker.log_metrics.assert_called_once_with(7, {"loss": 2.5, "learning_rate/language": 1e-4})
    alerts = [call.args for call in tracker.send_alert.mock_calls]
    assert [one[:2] for one in alerts] == ([("warning", alert)] if alert else [])
    assert all("step 7" in text for _, _, text in alerts)


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
def test_worse_evaluation_sends_alert(events, tracker, tmp_path, headline, before, now, worse):
    """The evaluation of other samples is not compared."""
    first, second = (
        EvalResult(step, loss, {headline: score} if headline else {}, headline)
        for step, (score, loss) in ((0, before), (4, now))
    )
    lines = [json.dumps(one.as_json()) + "\n" for one in (first, second)]
    RunDir(tmp_path).metrics_path.write_text("".join(lines))
    full = replace(second, validation_loss=9.0)
    events.log_evaluation(replace(second, full=full), "step-4")
    events.log_evaluation(replace(second, sample_set="0af1"), "step-4")
    scores = {f"scores/{headline}": now[0]} if headline else {}
    all_scores = {f"all_samples/{name}": score for name, score in scores.items()}
    assert tracker.log_metrics.mock_calls == [
        mock.call(4, {"validation_loss": now[1], **scores}),
        mock.call(4, {"all_samples/validation_loss": 9.0, **all_scores}),
        mock.call(4, {"validation_loss": now[1], **scores}),
    ]
    files = [tmp_path / f"predictions/{name}.jsonl" for name in ("before", "step-4")]
    assert tracker.log_examples.mock_calls == [mock.call(4, *files, None)] * 2
    alerts = [call.args for call in tracker.send_alert.mock_calls]
    side = "above" if headline in (None, "cer") else "below"
    title = f"{side} the score before training"
    assert alerts == ([("warning", title, worse)] if worse else [])


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
    monkeypatch.setattr(console_module.time, "perf_counter", lambda: now)
    output = io.StringIO()
    with ProgressConsole(Console(file=output)).progress_stage("reading", 30) as on_progress:
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
        with ProgressConsole(Console(file=output, width=200)).step_progress(4, 0) as progress:
            for step, wait_s in enumerate(waits_s, 1):
                progress.update(metrics | {"step": step, "data_wait_s": wait_s})
        for number, line in enumerate(output.getvalue().splitlines()):
            expected = f"  peak 1.0 GB  {percent.get(number)} % waiting for data"
            assert (expected in line) == ("waiting" in line) == (number in percent)
    output = io.StringIO()
    with ProgressConsole(Console(file=output, width=200)).step_progress(2, 0) as progress:
        rewards = {"reward": 1.07, "reward_std": 0.24, "frac_reward_zero_std": 0.4}
        for step in (1, 2):
            rollout = {"completions/clipped_ratio": 0.12, "rollout_s": 0.64, "reward_s": 0.0}
            progress.update(metrics | rollout | rewards | {"step": step, "data_wait_s": 0.01})
            rewards = {}
    first, last = output.getvalue().splitlines()
    assert "reward 1.07 ± 0.24  equal groups 40 %  truncated 12 %" in first
    assert "no reward" in last
    assert "64 % sampling" in last
    assert "waiting" not in last
