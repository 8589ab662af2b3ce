"""Tests of `finesight report`: output page and invalid arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_fixtures import write_gray_image
from run_dir_fixtures import START_RECORD, FakeRunDir, make_prediction_line

from finesight.cli.app import run_command
from finesight.data.sample import read_samples
from finesight.evaluate.metric_difference import read_predictions


@pytest.fixture
def fake_run_dir(tmp_path: Path) -> FakeRunDir:
    run = FakeRunDir(tmp_path / "run")
    run.write_metrics()
    return run


def test_report_is_written_into_run(
    fake_run_dir: FakeRunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert run_command(["report", str(fake_run_dir.folder)]) == 0
        assert capsys.readouterr().out == f"page: {fake_run_dir.folder}/report.html\n"
    assert "not finished: 60 of 60 steps" in (fake_run_dir.folder / "report.html").read_text()


def test_report_is_written_to_out(
    fake_run_dir: FakeRunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert run_command(["report", str(fake_run_dir.folder), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out)}
    assert out.exists()
    assert not (fake_run_dir.folder / "report.html").exists()


def test_report_language_option(fake_run_dir: FakeRunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    page = fake_run_dir.folder / "report.html"
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    for chosen, tag in (
        (["--language", "en"], "en"),
        (["--language", "zh"], "zh-Hans"),
        ([], "zh-Hans"),
    ):
        assert run_command(["report", str(fake_run_dir.folder), *chosen]) == 0
        assert f'<html lang="{tag}">' in page.read_text()


def test_incorrect_answers_are_written_and_imported(
    fake_run_dir: FakeRunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_gray_image(tmp_path / "a.png")
    lines = [
        make_prediction_line(f"s{number}", "x", f"answer {number}", score, image=str(image))
        for number, score in enumerate((0.5, 1.0, 0.0))
    ]
    out = tmp_path / "wrong.jsonl"
    arguments = ["report", str(fake_run_dir.folder), "--incorrect", str(out)]
    assert run_command(arguments) == 2
    assert "has no predictions" in capsys.readouterr().err
    fake_run_dir.write_predictions("after", lines)
    assert run_command(arguments) == 0
    assert capsys.readouterr().out.startswith(f"2 incorrect answers: {out}\n")
    assert [one.case.id for one in read_predictions(out)] == ["s0", "s2"]
    columns = ["--map", "image=image", "--map", "question=prompt", "--map", "answer=gold"]
    assert run_command(["import", str(out), str(tmp_path / "data"), *columns]) == 0
    samples = read_samples(tmp_path / "data" / "data.jsonl")
    assert [one.messages[-1].content[0].text for one in samples] == ["answer 0", "answer 2"]
    predictions = fake_run_dir.folder / "predictions" / "after.jsonl"
    assert run_command([*arguments[:3], str(predictions)]) == 2
    assert len(read_predictions(predictions)) == 3
    fake_run_dir.write_predictions("after", [lines[0] | {"scores": {}}])
    assert run_command(arguments) == 2
    assert "none of 1 predictions has a score" in capsys.readouterr().err


def test_incorrect_answers_have_the_images_of_the_run(
    fake_run_dir: FakeRunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded paths start at the working directory of the run."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
        write_gray_image(folder / "a.png")
    images = ["a.png", ["a.png", "missing.png"], str(elsewhere / "a.png"), None]
    lines = [
        make_prediction_line(f"s{i}", "x", "y", 0.5, image=one) for i, one in enumerate(images)
    ]
    fake_run_dir.write_predictions("after", lines)
    fake_run_dir.write_metrics(start=START_RECORD | {"working_dir": str(home)})
    monkeypatch.chdir(elsewhere)
    assert run_command(["report", str(fake_run_dir.folder), "--incorrect", "wrong.jsonl"]) == 0
    found = [one.record["image"] for one in read_predictions(Path("wrong.jsonl"))]
    image = str(home / "a.png")
    assert found == [image, [image, "missing.png"], images[2], None]


def test_folder_without_run_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is not a run directory" in error
    assert "manifest.json" in error


def test_user_file_is_not_overwritten(
    fake_run_dir: FakeRunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.html").write_text("precious")
    assert (
        run_command(["report", str(fake_run_dir.folder), "--out", str(tmp_path / "thesis.html")])
        == 2
    )
    assert "not a page of finesight" in capsys.readouterr().err
    assert (tmp_path / "thesis.html").read_text() == "precious"
    assert run_command(["report", str(fake_run_dir.folder), "--out", str(tmp_path)]) == 2
