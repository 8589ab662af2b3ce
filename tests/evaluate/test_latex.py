from __future__ import annotations

import json

import pytest

from finesight.evaluate.answered import Case
from finesight.evaluate.drawing import available
from finesight.evaluate.latex import latex_tokens, score


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


def test_scripts_in_scripts_of_scripts_are_ordered_however_deep():
    deep = 20_000
    tokens = latex_tokens("^{" * deep + "x" + "}_1" * deep)
    assert tokens[:4] == ["_", "1", "^", "{"]
    assert sorted(tokens) == sorted("^{" * (deep - 1) + "^x" + "}" * (deep - 1) + "_1" * deep)
    assert latex_tokens("^{" * deep) == ["^", "{"] * deep


def test_the_nearest_reference_counts_and_bleu_is_of_tokens():
    cases = [
        Case("x^2", (), ("y + z", "x^{2}"), ()),
        Case("a b c d", (), ("a b c e",), ()),
    ]
    scores = score(cases).scores
    assert scores["similarity"] == pytest.approx((1 + 0.75) / 2)
    assert (scores["exact"], scores["edit_distance"]) == (0.5, 0.5)
    # Matched of offered: 6 of 7, 4 of 5, 2 of 3, 0 of 1.
    assert scores["bleu"] == pytest.approx((6 / 7 * 4 / 5 * 2 / 3 * 1e-15) ** (1 / 4), rel=1e-6)


@pytest.mark.skipif(not available(), reason="ziamath is not installed")
def test_formulas_that_look_alike_agree_where_both_are_drawn():
    cases = [
        Case(r"\frac{1}{2}", (), (r"{1 \over 2}", r"{1}\over{2}"), ()),
        Case("$ a+b $", (), ("a + b",), ()),
        Case("a+c", (), ("a + b",), ()),
        Case(r"\left(", (), ("a",), ()),
        Case("a", (), (r"\left(",), ()),
    ]
    scored = score(cases)
    assert ["rendered" in one for one in scored.each] == [True, True, True, True, False]
    assert [one["rendered"] for one in scored.each[1:4]] == [1, 0, 0]
    assert scored.scores["rendered_share"] == pytest.approx(4 / 5)
    covered = [one["rendered"] for one in scored.each[:4]]
    assert scored.scores["rendered"] == pytest.approx(sum(covered) / 4)


@pytest.mark.skipif(not available(), reason="ziamath is not installed")
def test_real_formulas_are_drawn(shared):
    lines = (shared / "data/latex_ocr/latex_ocr.jsonl").read_text().splitlines()[::50]
    cases = [Case("?", (), (json.loads(line)["latex"],), ()) for line in lines]
    scores = score(cases).scores
    assert scores["rendered_share"] == 1
    assert scores["rendered"] == 0
