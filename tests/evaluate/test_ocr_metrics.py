from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finesight.evaluate.text_metrics import compute_edit_distance, fold_text, normalize_text


def _distance_by_table(a: list[str], b: list[str]) -> int:
    """Wagner and Fischer (1974): the whole table, cell by cell."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        below = [i]
        for j, y in enumerate(b, start=1):
            below.append(min(row[j] + 1, below[-1] + 1, row[j - 1] + (x != y)))
        row = below
    return row[-1]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2)],
)
def test_edit_distance_of_known_pairs(a, b, expected):
    assert compute_edit_distance(a, b) == expected


# Beyond 64 tokens, so that no machine word holds a column.
TOKENS = st.integers(0, 99).flatmap(
    lambda length: st.lists(st.sampled_from("abcd"), min_size=length, max_size=length)
)


@settings(max_examples=200)
@given(TOKENS, TOKENS)
def test_edit_distance_matches_reference(a, b):
    assert compute_edit_distance(a, b) == _distance_by_table(a, b)


def test_whitespace_normalization():
    assert normalize_text("  A\tword \n\n of it ") == "A word of it"
    assert normalize_text("cafe\u0301") == "café"
    assert normalize_text("A") != normalize_text("a")


def test_case_folding():
    assert fold_text(" «STOP!» ") == fold_text("stop")
    assert fold_text("ＡＢ") == "ab"
    assert fold_text("don't") == "don't"
    assert fold_text("3.5") != fold_text("35")
    # Classes and texts may be signs alone.
    assert len({fold_text(sign) for sign in ("*", "#", "-", "")}) == 4
