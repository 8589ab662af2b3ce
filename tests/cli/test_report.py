"""`finesight report`: the page of a run, where it goes, and what is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import MadeRun

from finesight.cli.app import run


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    run = MadeRun(tmp_path / "run")
    run.trained()
    return run


def test_the_page_goes_into_the_run(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["report", str(made.folder)]) == 0
        assert capsys.readouterr().out == f"page: {made.folder}/report.html\n"
    assert "not finished: 60 of 60 steps" in (made.folder / "report.html").read_text()


def test_or_elsewhere(made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert run(["report", str(made.folder), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out)}
    assert out.exists()
    assert not (made.folder / "report.html").exists()


def test_in_the_language_that_is_asked_for(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    page = made.folder / "report.html"
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    for chosen, tag in (
        (["--language", "en"], "en"),
        (["--language", "zh"], "zh-Hans"),
        ([], "zh-Hans"),
    ):
        assert run(["report", str(made.folder), *chosen]) == 0
        assert f'<html lang="{tag}">' in page.read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is not the folder of a run" in error
    assert "manifest.json" in error


def test_a_file_of_somebody_else_is_left_alone(
    made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.html").write_text("precious")
    assert run(["report", str(made.folder), "--out", str(tmp_path / "thesis.html")]) == 2
    assert "not a page that finesight made" in capsys.readouterr().err
    assert (tmp_path / "thesis.html").read_text() == "precious"
    assert run(["report", str(made.folder), "--out", str(tmp_path)]) == 2
