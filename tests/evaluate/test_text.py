from __future__ import annotations

import random

import pytest

from finesight.evaluate.text import edit_distance, folded_text, plain_text


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
    assert edit_distance(a, b) == expected


def test_edit_distance_equals_the_table():
    chance = random.Random(1)
    for _ in range(300):
        # Beyond 64 tokens, so that no machine word holds a column.
        a = [chance.choice("abcd") for _ in range(chance.randrange(100))]
        b = [chance.choice("abcd") for _ in range(chance.randrange(100))]
        assert edit_distance(a, b) == _distance_by_table(a, b), (a, b)


def test_plain_text():
    assert plain_text("  A\tword \n\n of it ") == "A word of it"
    assert plain_text("cafe\u0301") == "café"
    assert plain_text("A") != plain_text("a")


def test_folded_text():
    assert folded_text(" «STOP!» ") == folded_text("stop")
    assert folded_text("ＡＢ") == "ab"
    assert folded_text("don't") == "don't"
    assert folded_text("3.5") != folded_text("35")
    # Classes and texts may be signs alone.
    assert len({folded_text(sign) for sign in ("*", "#", "-", "")}) == 4
