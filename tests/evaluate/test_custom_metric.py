from __future__ import annotations

from pathlib import Path

import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.evaluate.custom_metric import (
    METRIC_COPY_FILE,
    load_custom_metric,
    parse_metric_path,
    resolve_metric_path,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.task_metrics import check_references, compute_metrics, get_primary_metric

TABLES = load_cases("custom_metric")

CASES = [EvalCase("abc", (), ("abd",), (), "s1"), EvalCase("x", (), ("x", "y"), (), "s2")]


def _write_metric(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:score"


def test_single_score_is_named_after_function(tmp_path):
    metric = _write_metric(tmp_path, "def score(case): return case.answer in case.references")
    scored = compute_metrics(metric, CASES)
    assert scored.scores == {"score": 0.5, "ended_with_eos": 1.0}
    assert get_primary_metric(metric, scored.scores) == "score"
    assert set(scored.intervals()) == {"score", "ended_with_eos"}


def test_several_scores_with_headline(tmp_path):
    metric = _write_metric(
        tmp_path,
        "HEADLINE = 'same'\n"
        "def score(case):\n"
        "    return {'length': len(case.answer), 'same': case.answer == case.references[0]}\n",
    )
    scored = compute_metrics(metric, CASES)
    assert list(scored.scores.items()) == [("same", 0.5), ("length", 2.0), ("ended_with_eos", 1.0)]
    assert get_primary_metric(metric, scored.scores) == "same"
    assert scored.per_sample[0] == {"same": 0.0, "length": 3.0}


@pytest.mark.parametrize(
    ("text", "where", "what"), TABLES["test_metric_error_is_reported_with_its_line"]
)
def test_metric_error_is_reported_with_its_line(tmp_path, text, where, what):
    metric = _write_metric(tmp_path, text)
    with pytest.raises(UserError, match=what) as caught:
        compute_metrics(metric, CASES)
    assert caught.value.where == str(tmp_path / where)


def test_missing_metric_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_custom_metric(tmp_path / "none.py", "score")


def test_broken_metric_fails_before_generation(tmp_path):
    metric = _write_metric(tmp_path, "def score(case): return case.no_such_thing\n")
    with pytest.raises(UserError, match="AttributeError"):
        check_references(metric, [(("a",), ())])
    metric = _write_metric(tmp_path, "def score(case): return case.answer.split()[0] == 'a'\n")
    with pytest.raises(UserError, match=r"IndexError.*answer ''"):
        check_references(metric, [(("a",), ())])
    metric = _write_metric(tmp_path, "def score(case): return case.answer == case.references[0]\n")
    check_references(metric, [(("",), ())])


@pytest.mark.parametrize("name", ["cer", "ended_with_eos"])
def test_reserved_score_names_are_rejected(tmp_path, name):
    metric = _write_metric(tmp_path, f"def score(case): return {{'right': 1, '{name}': 0.5}}\n")
    with pytest.raises(UserError, match=f"the score name {name} is reserved"):
        check_references(metric, [(("a",), ())])


def test_metric_names_and_paths_are_distinguished():
    assert parse_metric_path("captions") is None
    assert parse_metric_path("a/b.py:f") == (Path("a/b.py"), "f")
    assert parse_metric_path("~/b.py:f") == (Path("~/b.py").expanduser(), "f")


def test_copied_metric_replaces_missing_file(tmp_path):
    metric = _write_metric(tmp_path, "def score(case): return 1\n")
    run = tmp_path / "run"
    run.mkdir()
    assert resolve_metric_path(metric, run) == metric
    (run / METRIC_COPY_FILE).write_text("def score(case): return 0\n")
    assert resolve_metric_path(metric, run) == metric
    assert resolve_metric_path(metric, run, prefer_copy=True) == f"{run / METRIC_COPY_FILE}:score"
    (tmp_path / "mine.py").unlink()
    assert resolve_metric_path(metric, run) == f"{run / METRIC_COPY_FILE}:score"
    assert resolve_metric_path("ocr", run) == "ocr"
