"""Tests of comparison inputs and warnings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from comparison_fixtures import RECIPE, make_run, make_sign_answers, start_record
from run_dir_fixtures import START_RECORD, FakeRunDir, make_step_line

from finesight.errors import UserError
from finesight.report.comparison import find_common_samples, list_warnings, read_compared_runs

HALF, FULL = [0.5] * 8, [1.0] * 8


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first", make_sign_answers(tmp_path, HALF)).folder


def test_runs_and_prediction_files(first: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved" / "first"
    saved.parent.mkdir()
    shutil.copy(first / "predictions" / "before.jsonl", saved)
    entries = read_compared_runs([first, saved])
    assert [one.label for one in entries] == [f"A {tmp_path.name}/first", "B saved/first"]
    assert [one.metric for one in entries] == ["ocr", "ocr"], "by the names of their scores"
    assert len(find_common_samples(*entries)[0]) == 8
    assert list_warnings(*entries) == []


def test_average_precision_of_sets_of_different_size_is_not_compared(tmp_path: Path) -> None:
    recipe = RECIPE | {"eval": {"metric": "detection"}}
    runs = [
        make_run(
            tmp_path / name, make_sign_answers(tmp_path, marks), recipe=recipe, metric="f1"
        ).folder
        for name, marks in (("first", HALF), ("other", HALF[:6]), ("same", FULL))
    ]
    entries = read_compared_runs(runs)
    text = "answered 8 and 6 samples, so their AP values are not comparable"
    assert any(text in one for one in list_warnings(entries[0], entries[1]))
    assert list_warnings(entries[0], entries[2]) == []


def test_invalid_inputs_are_rejected(first: Path, tmp_path: Path) -> None:
    started_only = FakeRunDir(tmp_path / "begun")
    started_only.write_lines("metrics.jsonl", [START_RECORD, make_step_line(1)])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for others, words in (
        ([], "number of runs: 1"),
        ([tmp_path / str(i) for i in range(8)], "number of runs: 9"),
        ([first / ".." / "first"], "is given 2 times"),
        ([tmp_path / "frist"], "no such file or directory"),
        ([tmp_path / "empty"], "is not a run directory"),
        ([started_only.folder], "has no evaluation"),
        ([tmp_path / "text.txt"], "not a scored prediction"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_compared_runs([first, *others])
        assert error.value.remedy


def test_running_run_uses_its_last_evaluation(first: Path, tmp_path: Path) -> None:
    going = make_run(tmp_path / "going", make_sign_answers(tmp_path, HALF))
    (going.folder / "result.json").unlink()
    going.write_predictions("step-10", make_sign_answers(tmp_path, FULL))
    (going.folder / "predictions" / "after.jsonl").unlink()
    other = read_compared_runs([first, going.folder])[1]
    assert other.evaluation["step"] == 10
    assert {one.case.answer[:4] for one in other.predictions.values()} == {"sign"}
    assert other.status.kind == "killed"


def test_only_common_samples_are_compared(first: Path, tmp_path: Path) -> None:
    lines = make_sign_answers(tmp_path, FULL)[:6]
    lines[0]["prompt"] = "Something else?"
    lines[1]["gold"] = "another right answer"
    other = make_run(tmp_path / "other", lines)
    entries = read_compared_runs([first, other.folder])
    keys, different = find_common_samples(*entries)
    assert ([name for name, _ in keys], different) == (["s2", "s3", "s4", "s5"], 2)
    output = list_warnings(*entries)
    assert "compared on the 4 samples that both answered, of 8 and 6" in output[0]
    assert "2 samples of the same ID" in output[1]


def test_incomparable_runs_are_reported(first: Path, tmp_path: Path) -> None:
    settings = {"metric": "qa", "max_new_tokens": 32}
    elsewhere = start_record(fingerprint="07e4" * 16)
    lines = make_sign_answers(tmp_path, FULL)
    other = make_run(tmp_path / "other", lines, recipe=RECIPE | {"eval": settings}, start=elsewhere)
    output = "\n".join(list_warnings(*read_compared_runs([first, other.folder])))
    assert "A first uses the metric ocr, B other uses qa: their scores are not compared" in output
    assert "at most 64 tokens per answer, B other at most 32" in output
    assert (
        "validation losses of A first and B other are not compared: the validation data" in output
    )
    for line in lines:
        line["id"] = f"other {line['id']}"
    apart = make_run(tmp_path / "apart", lines)
    assert (
        "no validation samples in common"
        in list_warnings(*read_compared_runs([first, apart.folder]))[0]
    )
