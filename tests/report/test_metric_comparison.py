"""Tests of metrics of several runs and their differences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from comparison_fixtures import RECIPE, make_run, make_sign_answers, start_record

from finesight.evaluate.metric_difference import compare_prediction_files
from finesight.report.comparison import (
    MetricComparisonRow,
    compare_metrics,
    compare_samples,
    read_compared_runs,
)

MIXED, BETTER = [0.5, 1.0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25], [1.0] * 8


def comparison_rows(*paths: Path) -> dict[str, MetricComparisonRow]:
    return {row.name: row for row in compare_metrics(read_compared_runs(paths))}


def test_differences_match_the_paired_comparison(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder
    other = make_run(tmp_path / "other", make_sign_answers(tmp_path, BETTER), loss=0.5).folder
    rows = comparison_rows(first, other)
    assert next(iter(rows)) == "similarity"
    assert list(rows)[-1] == "validation_loss"
    files = (folder / "predictions" / "after.jsonl" for folder in (first, other))
    result = {one.name: one for one in compare_prediction_files("ocr", *files)}
    for name, row in rows.items():
        if name != "validation_loss":
            assert row.cells[1].difference == result[name], name
    assert rows["similarity"].cells[1].verdict == "better"
    assert rows["similarity"].cells[0].difference is None
    assert rows["cer"].cells[1].verdict == "better"
    loss = rows["validation_loss"].cells[1]
    assert (loss.change, loss.change_interval, loss.verdict) == (-0.5, None, "better")


def test_predictions_file_is_scored_with_intervals(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder
    saved = tmp_path / "saved.jsonl"
    shutil.copy(first / "predictions" / "after.jsonl", saved)
    own, copied = comparison_rows(first, saved)["similarity"].cells
    assert (copied.value, copied.interval) == (own.value, own.interval)
    assert (copied.change, copied.verdict) == (0.0, "same")


def strip_scores(path: Path, **more: object) -> Path:
    """Replace the scores of a prediction file by those of an unknown metric."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = [json.dumps(line | {"scores": {"unknown": 0.0}} | more) for line in lines]
    path.write_text("\n".join(records) + "\n")
    return path


def test_missing_scores_of_a_predictions_file_are_computed(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder
    shutil.copy(first / "predictions" / "after.jsonl", tmp_path / "saved.jsonl")
    saved = strip_scores(tmp_path / "saved.jsonl")
    rows = comparison_rows(first, saved)
    assert "unknown" not in rows
    own, computed = rows["similarity"].cells
    assert (computed.value, computed.interval, computed.verdict) == (
        own.value,
        own.interval,
        "same",
    )
    runs = read_compared_runs([first, saved])
    assert runs[1].metric == "ocr"
    samples = compare_samples(runs)
    assert samples.metric == "similarity"
    assert all(None not in sample.scores for sample in samples.displayed)


def test_scores_are_not_computed_without_references(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder
    shutil.copy(first / "predictions" / "after.jsonl", tmp_path / "saved.jsonl")
    saved = strip_scores(tmp_path / "saved.jsonl", gold="")
    run = read_compared_runs([first, saved])[1]
    assert (run.metric, run.score_names) == (None, {"unknown"})
    assert comparison_rows(first, saved)["similarity"].cells[1].value is None


def test_different_metric_or_data_is_not_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder
    other = make_run(
        tmp_path / "other",
        make_sign_answers(tmp_path, BETTER),
        recipe=RECIPE | {"eval": {"metric": "qa"}},
        start=start_record(fingerprint="07e4" * 16),
    ).folder
    rows = comparison_rows(first, other)
    assert all(row.cells[1].difference is None for row in rows.values())
    assert rows["similarity"].cells[1].value is not None


def test_custom_metric_is_not_executed(tmp_path: Path) -> None:
    program = tmp_path / "metric.py"
    program.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef mine(case): return 1.0\n")
    recipe = RECIPE | {"eval": {"metric": f"{program}:mine"}}
    folders = []
    for name, marks in (("first", MIXED * 3), ("other", BETTER * 3)):
        lines = [
            line | {"scores": {"mine": line["scores"]["similarity"]}}
            for line in make_sign_answers(tmp_path, marks)
        ]
        folders.append(make_run(tmp_path / name, lines, recipe=recipe, metric="mine").folder)
    rows = comparison_rows(*folders)
    assert list(rows) == ["mine", "validation_loss"]
    assert rows["mine"].cells[1].change == pytest.approx((sum(BETTER) - sum(MIXED)) / 8)
    assert rows["mine"].cells[1].verdict == "better"
    assert not (tmp_path / "ran").exists()
