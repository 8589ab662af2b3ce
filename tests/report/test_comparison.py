"""Comparison of runs and prediction files: inputs, metrics with differences, and warnings."""

import json
import shutil
from pathlib import Path

import pytest
from run_dir_fixtures import (
    RECIPE,
    START_RECORD,
    FakeRunDir,
    make_run,
    make_sign_answers,
    make_step_line,
    start_record,
)

from finesight.errors import UserError
from finesight.evaluate.metric_difference import compare_cases
from finesight.evaluate.prediction_file import read_predictions
from finesight.report.compare_page import compare_runs
from finesight.report.comparison import (
    compare_metrics,
    compare_samples,
    find_common_samples,
    list_warnings,
    read_compared_runs,
)
from finesight.report.metric_rows import MetricRow

MIXED, BETTER = [0.5, 1.0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25], [1.0] * 8
OTHER_DATA = start_record(fingerprint="07e4" * 16)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED)).folder


@pytest.fixture
def saved(first: Path, tmp_path: Path) -> Path:
    """A copy of the predictions of the first run."""
    (tmp_path / "saved").mkdir()
    return Path(shutil.copy(first / "predictions" / "after.jsonl", tmp_path / "saved" / "first"))


def compare(*paths: Path) -> dict[str, MetricRow]:
    return {row.name: row for row in compare_metrics(read_compared_runs(paths))}


def test_runs_and_prediction_files(first: Path, saved: Path, tmp_path: Path) -> None:
    entries = read_compared_runs([first, saved])
    assert [one.label for one in entries] == [f"A {tmp_path.name}/first", "B saved/first"]
    assert [one.metric for one in entries] == ["ocr", "ocr"], "by the names of their scores"
    assert len(find_common_samples(*entries)[0]) == 8
    assert list_warnings(*entries) == []
    own, copied = compare(first, saved)["similarity"].cells
    assert (copied.value, copied.interval) == (own.value, own.interval)
    assert (copied.change, copied.verdict) == (0.0, "no clear change")


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


def test_only_common_samples_are_compared(first: Path, tmp_path: Path) -> None:
    lines = make_sign_answers(tmp_path, BETTER)[:6]
    lines[0]["prompt"] = "Something else?"
    lines[1]["gold"] = "another right answer"
    entries = read_compared_runs([first, make_run(tmp_path / "other", lines).folder])
    keys, different = find_common_samples(*entries)
    assert ([name for name, _ in keys], different) == (["s2", "s3", "s4", "s5"], 2)
    common, same_id, *_ = list_warnings(*entries)
    assert "compared on the 4 samples that both answered, of 8 and 6" in common
    assert "2 samples of the same ID" in same_id


def test_different_metric_or_data_is_not_compared(first: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"eval": {"metric": "qa", "max_new_tokens": 32}}
    lines = make_sign_answers(tmp_path, BETTER)
    other = make_run(tmp_path / "other", lines, recipe=recipe, start=OTHER_DATA).folder
    rows = compare(first, other)
    assert all(row.cells[1].difference is None for row in rows.values())
    assert rows["similarity"].cells[1].value is not None
    output = "\n".join(list_warnings(*read_compared_runs([first, other])))
    for words in (
        "A first uses the metric ocr, B other uses qa: their scores are not compared",
        "at most 64 tokens per answer, B other at most 32",
        "validation losses of A first and B other are not compared: the validation data",
    ):
        assert words in output
    apart = make_run(tmp_path / "apart", [line | {"id": f"x{line['id']}"} for line in lines])
    warnings = list_warnings(*read_compared_runs([first, apart.folder]))
    assert "no validation samples in common" in warnings[0]


def test_average_precision_of_sets_of_different_size_is_not_compared(tmp_path: Path) -> None:
    recipe, runs = RECIPE | {"eval": {"metric": "detection"}}, []
    for name, marks in (("first", MIXED), ("other", MIXED[:6]), ("same", BETTER)):
        lines = make_sign_answers(tmp_path, marks)
        runs.append(make_run(tmp_path / name, lines, recipe=recipe, metric="f1").folder)
    first, other, same = read_compared_runs(runs)
    text = "answered 8 and 6 samples, so their AP values are not comparable"
    assert any(text in one for one in list_warnings(first, other))
    assert list_warnings(first, same) == []


def test_differences_match_the_paired_comparison(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", make_sign_answers(tmp_path, MIXED * 2)).folder
    answers = make_sign_answers(tmp_path, BETTER * 2)
    other = make_run(tmp_path / "other", answers, loss=0.5).folder
    rows = compare(first, other)
    assert (next(iter(rows)), list(rows)[-1]) == ("similarity", "validation_loss")
    files = (folder / "predictions" / "after.jsonl" for folder in (first, other))
    cases = ([one.case for one in read_predictions(file)] for file in files)
    result = {one.name: one for one in compare_cases("ocr", *cases)}
    loss = rows.pop("validation_loss").cells[1]
    assert (loss.change, loss.change_interval, loss.verdict) == (-0.5, None, "")
    assert {name: row.cells[1].difference for name, row in rows.items()} == result
    assert rows["similarity"].cells[0].difference is None
    assert rows["similarity"].cells[1].verdict == rows["cer"].cells[1].verdict == "better"


def replace_scores(path: Path, **more: object) -> None:
    """Replace the scores of a prediction file by those of an unknown metric."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = [json.dumps(line | {"scores": {"unknown": 0.0}} | more) for line in lines]
    path.write_text("\n".join(records) + "\n")


def test_missing_scores_of_a_predictions_file_are_computed(first: Path, saved: Path) -> None:
    replace_scores(saved)
    rows = compare(first, saved)
    assert "unknown" not in rows
    own, computed = rows["similarity"].cells
    assert (computed.value, computed.interval) == (own.value, own.interval)
    assert computed.verdict == "no clear change"
    runs = read_compared_runs([first, saved])
    assert runs[1].metric == "ocr"
    samples = compare_samples(runs)
    assert samples.metric == "similarity"
    assert all(None not in sample.scores for sample in samples.displayed)
    # Scores need references.
    replace_scores(saved, gold="")
    run = read_compared_runs([first, saved])[1]
    assert (run.metric, run.score_names) == (None, {"unknown"})
    assert compare(first, saved)["similarity"].cells[1].value is None
    table = compare_runs([first, saved]).format_table()
    assert [line.split()[:1] for line in table.splitlines()].count(["B"]) == 0, "no value, no row"


def test_scores_of_a_custom_metric_are_compared_without_its_execution(tmp_path: Path) -> None:
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
    rows = compare(*folders)
    assert list(rows) == ["mine", "validation_loss"]
    assert rows["mine"].cells[1].change == pytest.approx((sum(BETTER) - sum(MIXED)) / 8)
    assert rows["mine"].cells[1].verdict == "better"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("gold", ["sign", "", '<tool_call>{"name": "f"}</tool_call>'])
@pytest.mark.parametrize("is_run", [False, True])
def test_references_that_are_not_json_are_rejected(tmp_path: Path, gold: str, is_run: bool) -> None:
    recipe = RECIPE | {"eval": {"metric": "json"}}
    lines = make_sign_answers(tmp_path, MIXED)
    fitting = [line | {"gold": '{"number": 1}'} for line in lines]
    first = make_run(tmp_path / "first", fitting, recipe=recipe, metric="similarity").folder
    fitting[2]["gold"] = gold
    other = make_run(tmp_path / "other", fitting, recipe=recipe, metric="similarity").folder
    file = other / "predictions" / "after.jsonl"
    for paths in ([first, other if is_run else file], [other if is_run else file, first]):
        with pytest.raises(UserError, match="of sample 's2' is") as error:
            compare(*paths)
        assert error.value.where == str(file)
        assert error.value.remedy


METRICS = ["captions", "latex", "ocr", "qa", "classification", "tool_calls"]
METRICS += ["grounding", "detection", "pointing"]


@pytest.mark.parametrize("metric", METRICS)
def test_unfit_references_are_scored_by_other_metrics(tmp_path: Path, metric: str) -> None:
    recipe = RECIPE | {"eval": {"metric": metric}}
    lines = make_sign_answers(tmp_path, MIXED)
    first = make_run(tmp_path / "first", lines, recipe=recipe, metric="similarity").folder
    unfit = [line | {"gold": "", "gold_boxes": []} for line in lines]
    other = make_run(tmp_path / "other", unfit, recipe=recipe, metric="similarity").folder
    for path in (other, other / "predictions" / "after.jsonl"):
        comparison = compare_runs([first, path])
        assert comparison.format_table()
        assert any("differ in question or reference" in one for one in comparison.warnings)
