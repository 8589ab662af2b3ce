"""Tests of the run status by recorded events and folder lock."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import Browser
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_step_line,
)

from finesight.report.i18n import use_language
from finesight.report.run_page import LiveReportState, render_run_page, write_report
from finesight.report.run_reader import read_run
from finesight.report.summary import get_run_status


@pytest.fixture
def run(tmp_path: Path) -> FakeRunDir:
    """Run with 40 of 60 steps of half a second, evaluated at 0, 20 and 40."""
    made = FakeRunDir(tmp_path / "run")
    append_metrics(made)
    return made


def append_metrics(made: FakeRunDir, *more: JsonLine) -> None:
    early = [make_step_line(step) for step in range(1, 21)]
    late = [make_step_line(step) for step in range(21, 41)]
    measured = [make_evaluation_line(step, 0.5) for step in (0, 20, 40)]
    lines = [START_RECORD, measured[0], *early, measured[1], *late, measured[2], *more]
    made.write_lines("metrics.jsonl", lines)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the run directory like a training process."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def test_status_follows_the_lock_of_the_folder(run: FakeRunDir) -> None:
    with lock_run(run.folder):
        found = get_run_status(read_run(run.folder))
    # 20 steps of half a second, an evaluation of four seconds at the end, and one before.
    assert (found.kind, found.step, found.total_steps) == ("running", 40, 60)
    assert found.remaining_s == 18.0
    assert found.description == "The run is in progress: step 40 of 60, about a minute remaining."
    found = get_run_status(read_run(run.folder))
    assert (found.kind, found.remaining_s) == ("killed", None)
    assert "was killed after step 40 of 60" in found.description
    run.write_finished()
    with lock_run(run.folder):
        assert get_run_status(read_run(run.folder)).kind == "finished"
        assert 'role="status"' not in render_run_page(run.folder)


@pytest.mark.parametrize("how", ["interrupted", "failed"])
def test_end_reason_is_shown_until_resumed(run: FakeRunDir, how: str) -> None:
    end = {"step": 40, "ended_at": "2026-01-02T04:00:00+00:00", "status": how, "reason": "<b>it"}
    append_metrics(run, end)
    with lock_run(run.folder):
        found = get_run_status(read_run(run.folder))
        assert (found.kind, found.reason) == (how, "<b>it")
        page = render_run_page(run.folder)
        assert f"The run {'was ' if how == 'interrupted' else ''}{how} after step 40 of 60" in page
        assert "&lt;b&gt;it" in page
        append_metrics(run, end, START_RECORD | {"step": 40})
        assert get_run_status(read_run(run.folder)).kind == "running"


def test_remaining_time(run: FakeRunDir) -> None:
    steps = [*map(make_step_line, range(1, 41))]
    run.write_lines("metrics.jsonl", [START_RECORD | {"total_steps": 7240}, *steps])
    found = get_run_status(read_run(run.folder), is_training=True)
    in_english = "The run is in progress: step 40 of 7,240, about 1 h 00 min remaining."
    assert found.description == in_english
    with use_language("zh"):
        in_chinese = "训练正在进行：第 40 步（共 7,240 步），大约还需 1 小时 00 分钟。"
        assert found.description == in_chinese
    # Step numbers below 1 occur only in a damaged file.
    run.write_lines("metrics.jsonl", [START_RECORD, make_step_line(0)])
    found = get_run_status(read_run(run.folder), is_training=True)
    assert (found.kind, found.remaining_s) == ("running", None)
    run.write_lines("metrics.jsonl", [])
    found = get_run_status(read_run(run.folder), is_training=True)
    assert found.description == "The run is in progress, before its first step."


def test_examples_are_rendered_again_only_for_new_answers(run: FakeRunDir) -> None:
    live, record = LiveReportState(interval_s=60.0), read_run(run.folder)
    run.write_predictions("before", [])
    first = live.get_examples(record, 9)
    assert live.get_examples(record, 9) is first
    run.write_predictions("step-20", [])
    assert live.get_examples(record, 9) is not first


def test_stale_page_shows_its_age(browser: Browser, run: FakeRunDir) -> None:
    with lock_run(run.folder):
        file = write_report(run.folder, language="en")
    shown = "return byId('stale').hidden ? '' : byId('stale').textContent;"
    browser.open(file)
    assert browser.run(shown) == ""
    browser.run("DATA.live.written_at -= 7200; showStaleNotice();")
    assert browser.run(shown) == "This page is 120 minutes old. The run may have ended."
