"""Figures of several runs, and how sure their differences are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compared_runs import RECIPE, begun, run_with, signs

from finesight.evaluate.compare import paired_files
from finesight.report.contrast import Row, contrast
from finesight.report.entries import read_entries

MIXED, BETTER = [0.5, 1.0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25], [1.0] * 8


def rows_of(*paths: Path) -> dict[str, Row]:
    return {row.name: row for row in contrast(read_entries(paths))}


def test_differences_are_those_of_the_paired_comparison(tmp_path: Path) -> None:
    first = run_with(tmp_path / "first", signs(tmp_path, MIXED)).folder
    other = run_with(tmp_path / "other", signs(tmp_path, BETTER), loss=0.5).folder
    rows = rows_of(first, other)
    assert next(iter(rows)) == "similarity"
    assert list(rows)[-1] == "held_out_loss"
    files = (folder / "predictions" / "after.jsonl" for folder in (first, other))
    told = {one.name: one for one in paired_files("ocr", *files)}
    for name, row in rows.items():
        if name != "held_out_loss":
            assert row.cells[1].difference == told[name], name
    assert rows["similarity"].cells[1].verdict == "better"
    assert rows["similarity"].cells[0].difference is None
    assert rows["cer"].lower
    assert rows["cer"].cells[1].verdict == "better"
    loss = rows["held_out_loss"].cells[1]
    assert (loss.change, loss.change_ends, loss.verdict) == (-0.5, None, "better")


def test_a_file_of_answers_is_scored_with_intervals(tmp_path: Path) -> None:
    first = run_with(tmp_path / "first", signs(tmp_path, MIXED)).folder
    saved = tmp_path / "saved.jsonl"
    shutil.copy(first / "predictions" / "after.jsonl", saved)
    own, copied = rows_of(first, saved)["similarity"].cells
    assert (copied.value, copied.ends) == (own.value, own.ends)
    assert (copied.change, copied.verdict) == (0.0, "same")


def test_what_has_another_metric_or_data_is_not_compared(tmp_path: Path) -> None:
    first = run_with(tmp_path / "first", signs(tmp_path, MIXED)).folder
    other = run_with(
        tmp_path / "other",
        signs(tmp_path, BETTER),
        recipe=RECIPE | {"eval": {"metric": "qa"}},
        start=begun(fingerprint="07e4" * 16),
    ).folder
    rows = rows_of(first, other)
    assert all(row.cells[1].difference is None for row in rows.values())
    assert rows["similarity"].cells[1].value is not None


def test_a_metric_of_the_users_own_is_not_run(tmp_path: Path) -> None:
    program = tmp_path / "metric.py"
    program.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef mine(case): return 1.0\n")
    recipe = RECIPE | {"eval": {"metric": f"{program}:mine"}}
    folders = []
    for name, marks in (("first", MIXED), ("other", BETTER)):
        lines = [
            line | {"scores": {"mine": line["scores"]["similarity"]}}
            for line in signs(tmp_path, marks)
        ]
        folders.append(run_with(tmp_path / name, lines, recipe=recipe, metric="mine").folder)
    rows = rows_of(*folders)
    assert list(rows) == ["mine", "held_out_loss"]
    assert rows["mine"].cells[1].change == pytest.approx((sum(BETTER) - sum(MIXED)) / 8)
    assert rows["mine"].cells[1].verdict == "better"
    assert not (tmp_path / "ran").exists()
