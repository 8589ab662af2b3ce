"""Where a run stands, by what it has noted and who holds its folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import Browser
from run_folders import START, Line, MadeRun, measured_line, step_line

from finesight.report.language import speaking
from finesight.report.record import read_record
from finesight.report.run_page import Live, run_page, write_report
from finesight.report.standing import standing


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A run of 60 steps that has finished 40, at half a second each, measured at 0, 20 and 40."""
    made = MadeRun(tmp_path / "run")
    noted(made)
    return made


def noted(made: MadeRun, *more: Line) -> None:
    early = [step_line(step) for step in range(1, 21)]
    late = [step_line(step) for step in range(21, 41)]
    measured = [measured_line(step, 0.5) for step in (0, 20, 40)]
    lines = [START, measured[0], *early, measured[1], *late, measured[2], *more]
    made.lines("metrics.jsonl", lines)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As training holds the folder of its run."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def test_a_run_whose_folder_is_held_goes_on(run: MadeRun) -> None:
    with held(run.folder):
        found = standing(read_record(run.folder))
    # 20 steps at half a second; a measurement of four seconds at the end, another one on the way.
    assert (found.kind, found.step, found.total, found.left) == ("going", 40, 60, 18.0)
    assert found.words == "The run goes on: step 40 of 60, about a minute to go."


def test_nobody_holds_it_any_more(run: MadeRun) -> None:
    found = standing(read_record(run.folder))
    assert (found.kind, found.left) == ("silent", None)
    assert "ended without a word after step 40 of 60" in found.words


@pytest.mark.parametrize("how", ["interrupted", "failed"])
def test_what_ended_it_is_told_until_it_goes_on(run: MadeRun, how: str) -> None:
    noted(run, {"step": 40, "ended": "2026-01-02T04:00:00+00:00", "how": how, "why": "<b>it</b>"})
    with held(run.folder):
        found = standing(read_record(run.folder))
        assert (found.kind, found.why) == (how, "<b>it</b>")
        page = run_page(run.folder)
        assert f"The run {'was ' if how == 'interrupted' else ''}{how} after step 40 of 60" in page
        assert "&lt;b&gt;it&lt;/b&gt;" in page
        again = START | {"step": 40}
        noted(run, {"step": 40, "ended": "x", "how": how, "why": "x"}, again)
        assert standing(read_record(run.folder)).kind == "going"


def test_a_finished_run_has_nothing_to_say(run: MadeRun) -> None:
    run.finished()
    with held(run.folder):
        assert standing(read_record(run.folder)).kind == "finished"
        assert 'role="status"' not in run_page(run.folder)


def test_before_its_first_step(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    found = standing(read_record(made.folder), going=True)
    assert found.words == "The run goes on, and is before its first step."


def test_an_hour_is_told_as_one(run: MadeRun) -> None:
    run.lines("metrics.jsonl", [START | {"steps": 7240}, *map(step_line, range(1, 41))])
    found = standing(read_record(run.folder), going=True)
    assert found.words == "The run goes on: step 40 of 7,240, about 1 h 00 min to go."
    with speaking("zh"):
        assert found.words == "训练正在进行：第 40 步（共 7,240 步），大约还需 1 小时 00 分钟。"


def test_examples_are_drawn_anew_only_for_other_answers(run: MadeRun) -> None:
    live, record = Live(again=60.0), read_record(run.folder)
    run.answered("before", [])
    first = live.drawn(record, 9)
    assert live.drawn(record, 9) is first
    run.answered("step-20", [])
    assert live.drawn(record, 9) is not first


def test_a_page_that_nobody_writes_any_more_says_its_age(browser: Browser, run: MadeRun) -> None:
    with held(run.folder):
        file = write_report(run.folder, language="en")
    shown = "return byId('stale').hidden ? '' : byId('stale').textContent;"
    browser.open(file)
    assert browser.run(shown) == ""
    browser.run("DATA.live.written -= 7200; startStanding();")
    assert browser.run(shown) == ("This page is 120 minutes old: the run may have ended since.")
