from __future__ import annotations

import pytest

from finesight.evaluate.answered import Case
from finesight.evaluate.qa import anls, bare, score, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("$5.00", "500"),
        ("", ""),
    ],
)
def test_bare_text_as_squad_has_it(text, expected):
    assert bare(text) == expected


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
def test_f1_of_words(answer, truth, expected):
    assert word_f1(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Abcd", "abce", 0.75),
        ("ab", "cb", 0.5),
        ("abc", "axy", 0.0),
        ("a  b", "A b", 1.0),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_anls_and_its_threshold(answer, truth, expected):
    assert anls(answer, truth) == pytest.approx(expected)


def test_the_best_reference_counts_for_each_figure():
    scored = score([Case("a red car", (), ("blue bus", "red car", "red cart"), ())])
    assert scored.each == [{"anls": pytest.approx(7 / 9), "exact": 1.0, "f1": 1.0}]
    assert scored.scores == pytest.approx({"anls": 7 / 9, "exact": 1.0, "f1": 1.0})
