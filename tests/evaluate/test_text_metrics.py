"""Scores of plain texts: edit distance, questions and answers, classes."""

import pytest
from case_files import load_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.classification.score import OTHER_CLASS, score_classification
from finesight.evaluate.metrics.qa.score import (
    compute_anls,
    compute_word_f1,
    normalize_answer,
    score_qa,
)
from finesight.evaluate.text_metrics import compute_edit_distance, fold_text, normalize_text

CASES = load_cases("qa_metrics")


def compute_distance_by_table(a: list[str], b: list[str]) -> int:
    """Wagner and Fischer (1974): the whole table, cell by cell."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        below = [i]
        for j, y in enumerate(b, start=1):
            below.append(min(row[j] + 1, below[-1] + 1, row[j - 1] + (x != y)))
        row = below
    return row[-1]


# Beyond 64 tokens, so that no machine word holds a column.
TOKENS = st.integers(0, 99).flatmap(
    lambda length: st.lists(st.sampled_from("abcd"), min_size=length, max_size=length)
)


@settings(max_examples=60)
@given(TOKENS, TOKENS)
def test_edit_distance_matches_reference(a: list[str], b: list[str]) -> None:
    assert compute_edit_distance(a, b) == compute_distance_by_table(a, b)
    assert compute_edit_distance("kitten", "sitting") == 3


def test_normalization_and_case_folding() -> None:
    assert normalize_text("  A\tword \n\n of it ") == "A word of it"
    assert normalize_text("cafe\u0301") == "café"
    assert normalize_text("A") != normalize_text("a")
    assert fold_text(" «STOP!» ") == fold_text("stop")
    assert fold_text("ＡＢ") == "ab"
    assert fold_text("don't") == "don't"
    assert fold_text("3.5") != fold_text("35")
    # Classes and texts may be signs alone.
    assert len({fold_text(sign) for sign in ("*", "#", "-", "")}) == 4


@pytest.mark.parametrize(("text", "expected"), CASES["test_squad_normalization"])
def test_squad_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(("answer", "truth", "expected"), CASES["test_word_f1"])
def test_word_f1(answer: str, truth: str, expected: float) -> None:
    assert compute_word_f1(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "truth", "expected"), CASES["test_anls_threshold"])
def test_anls_threshold(answer: str, truth: str, expected: float) -> None:
    assert compute_anls(answer, truth) == pytest.approx(expected)


def test_best_reference_counts_per_score() -> None:
    scored = score_qa([EvalCase("a red car", (), ("blue bus", "red car", "red cart"), ())])
    assert scored.per_sample == [{"anls": pytest.approx(7 / 9), "exact": 1.0, "f1": 1.0}]
    assert scored.scores == pytest.approx({"anls": 7 / 9, "exact": 1.0, "f1": 1.0})


def make_cases(*pairs: tuple[str, str]) -> list[EvalCase]:
    return [EvalCase(answer, (), (truth,), ()) for answer, truth in pairs]


def test_accuracy_macro_f1_and_confusion() -> None:
    scored = score_classification(
        make_cases(
            *[("cat", "cat"), ("Cat.", "cat"), ("dog", "cat"), ("dog", "dog"), ("a bird", "dog")]
        )
    )
    cat, dog = 2 * 2 / (3 + 2), 2 * 1 / (2 + 2)
    assert scored.scores == pytest.approx({"accuracy": 3 / 5, "f1_macro": (cat + dog) / 2})
    assert scored.details["confusion"] == [
        ["cat", "cat", 2],
        ["cat", "dog", 1],
        ["dog", OTHER_CLASS, 1],
        ["dog", "dog", 1],
    ]
    assert [one["accuracy"] for one in scored.per_sample] == [1, 1, 0, 1, 0]
    several = score_classification([EvalCase("sofa", (), ("couch", "sofa"), ())])
    assert several.scores == {"accuracy": 1, "f1_macro": 1}
    assert several.details["confusion"] == [["sofa", "sofa", 1]]


def test_a_class_of_few_samples_leaves_the_mean_over_classes_without_an_interval() -> None:
    cases = [("a", "a")] * 40 + [("b", "b")] * 4
    scored = score_classification(make_cases(*cases))
    assert scored.intervals()["f1_macro"] is None
    assert scored.notes() == {"f1_macro": REASON_RARE_CLASS}
    scored = score_classification(make_cases(*cases, ("a", "b")))
    low, high = scored.intervals()["f1_macro"] or (1, 0)
    # The rare class decides: one sample of 5, not one of 45.
    assert low < 0.85 < scored.scores["f1_macro"] < high
    assert scored.notes() == {}
