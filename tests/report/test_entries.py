"""What may be compared with what: runs, answers in files, and what speaks against it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compared_runs import RECIPE, begun, run_with, signs
from run_folders import START, MadeRun, step_line

from finesight.errors import UserError
from finesight.report.entries import cautions, read_entries, shared

HALF, FULL = [0.5] * 8, [1.0] * 8


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return run_with(tmp_path / "first", signs(tmp_path, HALF)).folder


def test_runs_and_files_of_answers(first: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved" / "first"
    saved.parent.mkdir()
    shutil.copy(first / "predictions" / "before.jsonl", saved)
    entries = read_entries([first, saved])
    assert [one.label for one in entries] == [f"A {tmp_path.name}/first", "B saved/first"]
    assert [one.metric for one in entries] == ["ocr", "ocr"], "by the names of their scores"
    assert len(shared(*entries)[0]) == 8
    assert cautions(*entries) == []


def test_average_precision_of_sets_of_different_size_is_not_compared(tmp_path: Path) -> None:
    recipe = RECIPE | {"eval": {"metric": "detection"}}
    runs = [
        run_with(tmp_path / name, signs(tmp_path, marks), recipe=recipe, metric="f1").folder
        for name, marks in (("first", HALF), ("other", HALF[:6]), ("same", FULL))
    ]
    entries = read_entries(runs)
    text = "answered 8 and 6 samples, and their values of AP are not to be compared"
    assert any(text in one for one in cautions(entries[0], entries[1]))
    assert cautions(entries[0], entries[2]) == []


def test_what_is_refused(first: Path, tmp_path: Path) -> None:
    begun_only = MadeRun(tmp_path / "begun")
    begun_only.lines("metrics.jsonl", [START, step_line(1)])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for others, words in (
        ([], "1 given"),
        ([tmp_path / str(i) for i in range(8)], "9 given"),
        ([first / ".." / "first"], "is given 2 times"),
        ([tmp_path / "frist"], "no such folder"),
        ([tmp_path / "empty"], "is not the folder of a run"),
        ([begun_only.folder], "was never measured"),
        ([tmp_path / "text.txt"], "no answer with its scores"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_entries([first, *others])
        assert error.value.remedy


def test_a_run_that_goes_on_has_its_last_measurement(first: Path, tmp_path: Path) -> None:
    going = run_with(tmp_path / "going", signs(tmp_path, HALF))
    (going.folder / "result.json").unlink()
    going.answered("step-10", signs(tmp_path, FULL))
    (going.folder / "predictions" / "after.jsonl").unlink()
    other = read_entries([first, going.folder])[1]
    assert other.measured["step"] == 10
    assert {one.case.answer[:4] for one in other.answers.values()} == {"sign"}
    assert other.standing is not None
    assert other.standing.kind == "silent"


def test_only_the_same_questions_are_shared(first: Path, tmp_path: Path) -> None:
    lines = signs(tmp_path, FULL)[:6]
    lines[0]["prompt"] = "Something else?"
    lines[1]["gold"] = "another right answer"
    other = run_with(tmp_path / "other", lines)
    entries = read_entries([first, other.folder])
    keys, unlike = shared(*entries)
    assert ([name for name, _ in keys], unlike) == (["s2", "s3", "s4", "s5"], 2)
    said = cautions(*entries)
    assert "compared on the 4 samples that both answered, of 8 and 6" in said[0]
    assert "2 samples of the same id" in said[1]


def test_what_cannot_be_compared_is_said(first: Path, tmp_path: Path) -> None:
    settings = {"metric": "qa", "max_new_tokens": 32}
    elsewhere = begun(fingerprint="07e4" * 16)
    lines = signs(tmp_path, FULL)
    other = run_with(tmp_path / "other", lines, recipe=RECIPE | {"eval": settings}, start=elsewhere)
    said = "\n".join(cautions(*read_entries([first, other.folder])))
    assert "A first was measured by ocr, B other by qa: their scores are not compared" in said
    assert "in at most 64 tokens, B other in at most 32" in said
    assert "held-out losses of A first and B other are not compared: they are of different" in said
    for line in lines:
        line["id"] = f"other {line['id']}"
    apart = run_with(tmp_path / "apart", lines)
    assert "no held-out sample in common" in cautions(*read_entries([first, apart.folder]))[0]
