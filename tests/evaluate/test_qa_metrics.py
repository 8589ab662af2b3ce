from __future__ import annotations

import pytest
from case_files import load_cases

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.text_metrics import (
    compute_anls,
    compute_word_f1,
    normalize_answer,
    score_qa,
)

CASES = load_cases("qa_metrics")


@pytest.mark.parametrize(("text", "expected"), CASES["test_squad_normalization"])
def test_squad_normalization(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the red car", "a red car", 1.0),
        ("red car", "red bus", 0.5),
        ("red red", "red", 2 / 3),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("x", "", 0.0),
    ],
)
def test_word_f1(answer, truth, expected):
    assert compute_word_f1(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "truth", "expected"), CASES["test_anls_threshold"])
def test_anls_threshold(answer, truth, expected):
    assert compute_anls(answer, truth) == pytest.approx(expected)


def test_best_reference_counts_per_score():
    scored = score_qa([EvalCase("a red car", (), ("blue bus", "red car", "red cart"), ())])
    assert scored.per_sample == [{"anls": pytest.approx(7 / 9), "exact": 1.0, "f1": 1.0}]
    assert scored.scores == pytest.approx({"anls": 7 / 9, "exact": 1.0, "f1": 1.0})
