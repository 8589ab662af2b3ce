"""Tests of `finesight compare`: table, page, invalid arguments."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from run_dir_fixtures import make_run, make_sign_answers

HALF, FULL = [0.5] * 8, [1.0] * 8
PAGE = ("--out", "page.html", "--language", "en")


@pytest.fixture
def make_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[float], Sequence[float]], list[str]]:
    """Make two runs in the working directory with these correct fractions of the answers."""
    monkeypatch.chdir(tmp_path)

    def make(*marks: Sequence[float]) -> list[str]:
        runs = dict(zip(("first", "other"), marks, strict=True))
        for name, one in runs.items():
            make_run(Path(name), make_sign_answers(tmp_path, one))
            shutil.copy(Path(name, "predictions/after.jsonl"), f"{name}.jsonl")
        return list(runs)

    return make


def test_comparison_table_and_page(make_runs, cli):
    runs, page = make_runs(HALF, FULL), Path("page.html")
    cli("compare", *runs, *PAGE)
    lines = cli("compare", *runs, *PAGE).lines
    assert lines[0].split() == ["run", "metric", "value", "difference", "95", "%", "interval"]
    assert lines[2].startswith("B other  similarity       1.0000     +0.4667  ")
    assert lines[2].endswith("  better")
    assert lines[-1] == f"page: {page}"
    text = page.read_text()
    assert "Comparison of 2 runs" in text
    assert "Unknown for prediction files" not in text
    cli("compare", *runs, "--out", page, "--language", "zh")
    assert "2 个训练的比较" in page.read_text()
    first, other = cli("compare", *runs, *PAGE, "--json").json["runs"]
    assert [first["path"], other["path"]] == runs
    found = other["metrics"]["similarity"]
    assert (found["value"], found["verdict"]) == (1.0, "better")
    assert "verdict" not in first["metrics"]["similarity"]


def test_prediction_files(make_runs, cli):
    make_runs(HALF, FULL)
    rows = [line.split() for line in cli("compare", "first.jsonl", "other.jsonl", *PAGE).lines]
    assert ["A", "first.jsonl", "similarity", "0.5000"] in rows
    assert ["B", "other.jsonl", "similarity", "1.0000", "+0.5000"] in [row[:5] for row in rows]
    text = Path("page.html").read_text()
    assert "are equal" not in text
    assert "Unknown for prediction files" in text
    cli("compare", "first", "first.jsonl", *PAGE)
    assert "Unknown for prediction files" in Path("page.html").read_text()


def test_scores_of_common_samples_are_shown(make_runs, cli):
    runs = make_runs(HALF, [*HALF, *FULL[:4]])
    line = cli("compare", *runs, *PAGE).lines[2]
    assert line.endswith("  no clear change (0.5333 and 0.5333 on 8 common samples)")
    assert "0.5333 and 0.5333 on 8 common samples" in Path("page.html").read_text()
    metrics = cli("compare", *runs, *PAGE, "--json").json["runs"][1]["metrics"]
    common = metrics["similarity"]["common_samples"]
    assert (common["num_samples"], common["before"]) == (8, common["after"])
    assert "common_samples" not in metrics["validation_loss"]


def test_no_page_is_written_for_invalid_arguments(make_runs, cli):
    runs, page = make_runs(HALF, FULL), Path("page.html")
    for given in (["first"], ["first", "first"], ["first", "."]):
        assert "remedy: " in cli("compare", *given, *PAGE, code=2).err
    assert not page.exists()
    page.write_text("precious")
    cli("compare", *runs, *PAGE, code=2)
    assert page.read_text() == "precious"
