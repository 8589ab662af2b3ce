from __future__ import annotations

import json

import pytest
from case_files import load_cases

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.latex_metrics import score_latex, tokenize_latex
from finesight.evaluate.latex_rendering import is_ziamath_installed

CASES = load_cases("latex_metrics")


@pytest.mark.parametrize(("one", "other"), CASES["test_equivalent_latex_has_equal_tokens"])
def test_equivalent_latex_has_equal_tokens(one, other):
    assert tokenize_latex(one) == tokenize_latex(other)


@pytest.mark.parametrize(("one", "other"), CASES["test_different_typesetting_has_different_tokens"])
def test_different_typesetting_has_different_tokens(one, other):
    assert tokenize_latex(one) != tokenize_latex(other)


@pytest.mark.parametrize(
    "broken", ["", "x^", "^_", "}}{", r"\text{a", "x^{a_", "\\", "_{}^{}", "$"]
)
def test_broken_latex_keeps_all_characters(broken):
    assert "".join(tokenize_latex(broken)) == broken


def test_normalizing_tokens_is_idempotent(shared):
    lines = (shared / "data/latex_ocr/latex_ocr.jsonl").read_text().splitlines()
    for line in lines:
        tokens = tokenize_latex(json.loads(line)["latex"])
        assert tokenize_latex(" ".join(tokens)) == tokens


def test_deeply_nested_scripts_are_ordered():
    deep = 20_000
    tokens = tokenize_latex("^{" * deep + "x" + "}_1" * deep)
    assert tokens[:4] == ["_", "1", "^", "{"]
    assert sorted(tokens) == sorted("^{" * (deep - 1) + "^x" + "}" * (deep - 1) + "_1" * deep)
    assert tokenize_latex("^{" * deep) == ["^", "{"] * deep


def test_best_reference_counts_and_bleu_uses_tokens():
    cases = [
        EvalCase("x^2", (), ("y + z", "x^{2}"), ()),
        EvalCase("a b c d", (), ("a b c e",), ()),
    ]
    scores = score_latex(cases).scores
    assert scores["similarity"] == pytest.approx((1 + 0.75) / 2)
    assert (scores["exact"], scores["edit_distance"]) == (0.5, 0.5)
    # Matched of offered: 6 of 7, 4 of 5, 2 of 3, 0 of 1.
    assert scores["bleu"] == pytest.approx((6 / 7 * 4 / 5 * 2 / 3 * 1e-15) ** (1 / 4), rel=1e-6)


@pytest.mark.skipif(not is_ziamath_installed(), reason="ziamath is not installed")
def test_rendered_equality_of_formulas():
    cases = [
        EvalCase(r"\frac{1}{2}", (), (r"{1 \over 2}", r"{1}\over{2}"), ()),
        EvalCase("$ a+b $", (), ("a + b",), ()),
        EvalCase("a+c", (), ("a + b",), ()),
        EvalCase(r"\left(", (), ("a",), ()),
        EvalCase("a", (), (r"\left(",), ()),
    ]
    scored = score_latex(cases)
    assert ["rendered" in one for one in scored.per_sample] == [True, True, True, True, False]
    assert [one["rendered"] for one in scored.per_sample[1:4]] == [1, 0, 0]
    assert scored.scores["rendered_share"] == pytest.approx(4 / 5)
    covered = [one["rendered"] for one in scored.per_sample[:4]]
    assert scored.scores["rendered"] == pytest.approx(sum(covered) / 4)


@pytest.mark.skipif(not is_ziamath_installed(), reason="ziamath is not installed")
def test_real_formulas_are_rendered(shared):
    lines = (shared / "data/latex_ocr/latex_ocr.jsonl").read_text().splitlines()[::50]
    cases = [EvalCase("?", (), (json.loads(line)["latex"],), ()) for line in lines]
    scores = score_latex(cases).scores
    assert scores["rendered_share"] == 1
    assert scores["rendered"] == 0
