from __future__ import annotations

import numpy as np
import pytest

from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.text_metrics import OTHER_CLASS, score_classification


def _cases(*pairs: tuple[str, str]) -> list[EvalCase]:
    return [EvalCase(said, (), (right,), ()) for said, right in pairs]


def test_accuracy_macro_f1_and_confusion():
    scored = score_classification(
        _cases(("cat", "cat"), ("Cat.", "cat"), ("dog", "cat"), ("dog", "dog"), ("a bird", "dog"))
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


def test_any_correct_class_counts():
    scored = score_classification([EvalCase("sofa", (), ("couch", "sofa"), ())])
    assert scored.scores == {"accuracy": 1, "f1_macro": 1}
    assert scored.details["confusion"] == [["sofa", "sofa", 1]]


def test_macro_f1_matches_per_class_counts():
    chance = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    pairs = [(names[i], names[j]) for i, j in chance.integers(0, 4, (200, 2))]
    expected = []
    for name in names:
        right = sum(s == r == name for s, r in pairs)
        output, wanted = sum(s == name for s, _ in pairs), sum(r == name for _, r in pairs)
        expected.append(2 * right / (output + wanted))
    assert score_classification(_cases(*pairs)).scores["f1_macro"] == pytest.approx(
        np.mean(expected)
    )


def test_classes_missing_from_resample_are_ignored():
    one = score_classification(_cases(("a", "a"), ("b", "b"))).estimators["f1_macro"]
    assert one.score_from_sums(one.weighted_sums(np.array([[2.0, 0.0]]))) == 1


def test_a_class_of_few_samples_leaves_the_mean_over_classes_without_an_interval():
    common, rare = [("a", "a")] * 40, [("b", "b")] * 4
    scored = score_classification(_cases(*common, *rare))
    assert scored.intervals()["f1_macro"] is None
    assert scored.notes() == {"f1_macro": REASON_RARE_CLASS}
    scored = score_classification(_cases(*common, *rare, ("a", "b")))
    low, high = scored.intervals()["f1_macro"]
    # The sample in five decides, not the one in forty-five.
    assert low < 0.85 < scored.scores["f1_macro"] < high
    assert scored.notes() == {}
