"""Tests of `finesight compare`: table, page, invalid arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from comparison_fixtures import make_run, make_sign_answers

from finesight.cli.app import run_command


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    made = [("first", [0.5] * 8), ("other", [1.0] * 8)]
    return [
        str(make_run(tmp_path / n, make_sign_answers(tmp_path, marks)).folder) for n, marks in made
    ]


def test_comparison_table_and_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        assert run_command(["compare", *runs, "--out", str(out), "--language", "en"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "metric", "value", "difference", "95", "%", "interval"]
    assert lines[2].startswith("B other  similarity       1.0000     +0.4667  ")
    assert lines[2].endswith("  better")
    assert lines[-1] == f"page: {out}"
    assert "Comparison of 2 runs" in out.read_text()
    assert run_command(["compare", *runs, "--out", str(out), "--language", "zh"]) == 0
    assert "2 个训练的比较" in out.read_text()


def test_prediction_files(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for run in runs:
        files.append(f"{run}.jsonl")
        shutil.copy(Path(run) / "predictions" / "after.jsonl", files[-1])
    out = tmp_path / "page.html"
    assert run_command(["compare", *files, "--out", str(out), "--language", "en"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["A", "first.jsonl", "similarity", "0.5000"] in rows
    assert ["B", "other.jsonl", "similarity", "1.0000", "+0.5000"] in [row[:5] for row in rows]
    text = out.read_text()
    assert "are equal" not in text
    assert "Unknown for prediction files" in text
    assert run_command(["compare", *runs, "--out", str(out), "--language", "en"]) == 0
    assert "Unknown for prediction files" not in out.read_text()
    assert run_command(["compare", runs[0], files[0], "--out", str(out), "--language", "en"]) == 0
    assert "Unknown for prediction files" in out.read_text()


def test_notes_name_the_metric_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        str(make_run(tmp_path / name, make_sign_answers(tmp_path, marks)).folder)
        for name, marks in (("first", [0.5] * 3), ("other", [1.0] * 3))
    ]
    assert run_command(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 0
    notes = capsys.readouterr().out.splitlines()
    assert "validation_loss: no interval: only the sum over all samples is known" in notes
    assert any(line.startswith("similarity: no interval: ") for line in notes), notes


def test_scores_of_common_samples_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = (
        str(make_run(tmp_path / name, make_sign_answers(tmp_path, marks)).folder)
        for name, marks in (("first", [0.5] * 8), ("other", [0.5] * 8 + [1.0] * 4))
    )
    page = str(tmp_path / "page.html")
    assert run_command(["compare", first, other, "--out", page]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.endswith("  no clear change (0.5333 and 0.5333 on 8 common samples)")
    assert "0.5333 and 0.5333 on 8 common samples" in Path(page).read_text()
    assert run_command(["compare", first, other, "--out", page, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["runs"][1]["metrics"]
    common = metrics["similarity"]["common_samples"]
    assert (common["num_samples"], common["before"]) == (8, common["after"])
    assert "common_samples" not in metrics["validation_loss"]


def test_few_predictions_have_one_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, marks in (("first", [0.5] * 8), ("other", [0.5] * 7 + [1.0])):
        run = make_run(tmp_path / name, make_sign_answers(tmp_path, marks)).folder
        files.append(f"{run}.jsonl")
        shutil.copy(run / "predictions" / "after.jsonl", files[-1])
    assert run_command(["compare", *files, "--out", str(tmp_path / "page.html")]) == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("B other.jsonl  similarity")]
    assert " to " in line
    assert "similarity: no interval" not in output


def test_json_output(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["compare", *runs, "--out", str(tmp_path / "page.html"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in result["runs"]] == runs
    found = result["runs"][1]["metrics"]["similarity"]
    assert (found["value"], found["verdict"]) == (1.0, "better")
    assert "verdict" not in result["runs"][0]["metrics"]["similarity"]


def test_no_page_is_written_for_invalid_arguments(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for given in ([runs[0]], [runs[0], runs[0]], [runs[0], str(tmp_path)]):
        assert run_command(["compare", *given, "--out", str(out)]) == 2
        assert "remedy: " in capsys.readouterr().err
    assert not out.exists()
    out.write_text("precious")
    assert run_command(["compare", *runs, "--out", str(out)]) == 2
    assert out.read_text() == "precious"
