from __future__ import annotations

import json
import random

import pytest

from finesight.evaluate.text import edit_distance, folded_text, latex_tokens, plain_text


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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x^{2}", "x ^ 2"),
        (r"\frac{1}{2}", r"\frac 1 2"),
        (r"\frac12", r"\frac { 1 } { 2 }"),
        ("x^2_i", "x_i^{2}"),
        ("x^{a+b}_{i j}", "x_{ij}^{a + b}"),
        ("x^{y^2_i}_k", "x_k^{y_i^2}"),
        ("$$ a + b $$", r"\[a+b\]"),
        ("$a$", "a"),
        (r"\begin{array} {cc} a & b \end {array}", r"\begin{ array }{cc}a&b\end{array}"),
        (r"\text{for  all } x", r"\text {for all} x"),
        ("{{x}}", "x"),
        (r"\alpha\beta", "\\alpha\n \\beta"),
    ],
)
def test_latex_that_means_the_same_is_equal(one, other):
    assert latex_tokens(one) == latex_tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\left( x \right)", "( x )"),
        (r"a \, b", "a b"),
        (r"\alpha x", r"\alphax"),
        (r"\text{a b}", r"\text{ab}"),
        ("x^{ab}", "x^a b"),
        ("{a+b}c", "a+bc"),
        ("$a$ and $b$", "a and b"),
        (r"\{x\}", "{x}"),
        ("x^2", "x_2"),
        (r"a\ b", "a b"),
    ],
)
def test_latex_that_is_typeset_otherwise_differs(one, other):
    assert latex_tokens(one) != latex_tokens(other)


@pytest.mark.parametrize(
    "broken", ["", "x^", "^_", "}}{", r"\text{a", "x^{a_", "\\", "_{}^{}", "$"]
)
def test_latex_that_is_broken_loses_nothing(broken):
    assert "".join(latex_tokens(broken)) == broken


def test_latex_tokens_of_real_formulas_are_stable(shared):
    lines = (shared / "data/latex_ocr/latex_ocr.jsonl").read_text().splitlines()
    for line in lines:
        tokens = latex_tokens(json.loads(line)["latex"])
        assert latex_tokens(" ".join(tokens)) == tokens


def test_plain_text():
    assert plain_text("  A\tword \n\n of it ") == "A word of it"
    assert plain_text("cafe\u0301") == "café"
    assert plain_text("A") != plain_text("a")


def test_folded_text():
    assert folded_text(" «STOP!» ") == folded_text("stop")
    assert folded_text("ＡＢ") == "ab"
    assert folded_text("don't") == "don't"
    assert folded_text("3.5") != folded_text("35")
