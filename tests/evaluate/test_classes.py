from __future__ import annotations

import numpy as np
import pytest

from finesight.evaluate.answered import Case
from finesight.evaluate.bootstrap import RARE
from finesight.evaluate.classes import OTHER, score


def _cases(*pairs: tuple[str, str]) -> list[Case]:
    return [Case(said, (), (right,), ()) for said, right in pairs]


def test_accuracy_mean_f1_and_confusion():
    scored = score(
        _cases(("cat", "cat"), ("Cat.", "cat"), ("dog", "cat"), ("dog", "dog"), ("a bird", "dog"))
    )
    cat, dog = 2 * 2 / (3 + 2), 2 * 1 / (2 + 2)
    assert scored.scores == pytest.approx({"accuracy": 3 / 5, "f1_macro": (cat + dog) / 2})
    assert scored.details["confusion"] == [
        ["cat", "cat", 2],
        ["cat", "dog", 1],
        ["dog", OTHER, 1],
        ["dog", "dog", 1],
    ]
    assert [one["accuracy"] for one in scored.each] == [1, 1, 0, 1, 0]


def test_of_several_right_classes_the_one_that_was_said():
    scored = score([Case("sofa", (), ("couch", "sofa"), ())])
    assert scored.scores == {"accuracy": 1, "f1_macro": 1}
    assert scored.details["confusion"] == [["sofa", "sofa", 1]]


def test_f1_equals_the_counting_of_each_class():
    chance = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    pairs = [(names[i], names[j]) for i, j in chance.integers(0, 4, (200, 2))]
    expected = []
    for name in names:
        right = sum(s == r == name for s, r in pairs)
        said, wanted = sum(s == name for s, _ in pairs), sum(r == name for _, r in pairs)
        expected.append(2 * right / (said + wanted))
    assert score(_cases(*pairs)).scores["f1_macro"] == pytest.approx(np.mean(expected))


def test_classes_that_a_resample_lacks_do_not_count():
    one = score(_cases(("a", "a"), ("b", "b"))).estimators["f1_macro"]
    assert one.value(one.sums(np.array([[2.0, 0.0]]))) == 1


def test_a_class_of_few_samples_leaves_the_mean_over_classes_without_an_interval():
    common, rare = [("a", "a")] * 40, [("b", "b")] * 4
    scored = score(_cases(*common, *rare))
    assert scored.intervals()["f1_macro"] is None
    assert scored.notes() == {"f1_macro": RARE}
    scored = score(_cases(*common, *rare, ("a", "b")))
    low, high = scored.intervals()["f1_macro"]
    # The sample in five decides, not the one in forty-five.
    assert low < 0.85 < scored.scores["f1_macro"] < high
    assert scored.notes() == {}
