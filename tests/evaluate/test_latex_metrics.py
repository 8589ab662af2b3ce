"""Tokens of formulas, and their rendered equality."""

import pytest
from case_files import load_cases

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.latex.score import (
    MAX_FORMULA_LENGTH,
    is_ziamath_installed,
    render_digests,
    score_latex,
    tokenize_latex,
)

CASES = load_cases("latex_metrics")
needs_ziamath = pytest.mark.skipif(not is_ziamath_installed(), reason="ziamath is not installed")


@pytest.mark.parametrize(("one", "other"), CASES["test_equivalent_latex_has_equal_tokens"])
def test_equivalent_latex_has_equal_tokens(one: str, other: str) -> None:
    assert tokenize_latex(one) == tokenize_latex(other)


@pytest.mark.parametrize(("one", "other"), CASES["test_different_typesetting_has_different_tokens"])
def test_different_typesetting_has_different_tokens(one: str, other: str) -> None:
    assert tokenize_latex(one) != tokenize_latex(other)


@pytest.mark.parametrize(
    "broken", ["", "x^", "^_", "}}{", r"\text{a", "x^{a_", "\\", "_{}^{}", "$"]
)
def test_broken_latex_keeps_all_characters(broken: str) -> None:
    assert "".join(tokenize_latex(broken)) == broken


def test_deeply_nested_scripts_are_ordered() -> None:
    deep = 20_000
    tokens = tokenize_latex("^{" * deep + "x" + "}_1" * deep)
    assert tokens[:4] == ["_", "1", "^", "{"]
    assert sorted(tokens) == sorted("^{" * (deep - 1) + "^x" + "}" * (deep - 1) + "_1" * deep)
    assert tokenize_latex("^{" * deep) == ["^", "{"] * deep


def test_best_reference_counts_and_bleu_uses_tokens() -> None:
    cases = [EvalCase("x^2", (), ("y + z", "x^{2}"), ()), EvalCase("a b c d", (), ("a b c e",), ())]
    scores = score_latex(cases).scores
    assert scores["similarity"] == pytest.approx((1 + 0.75) / 2)
    assert (scores["exact"], scores["edit_distance"]) == (0.5, 0.5)
    # Matched of offered: 6 of 7, 4 of 5, 2 of 3, 0 of 1.
    assert scores["bleu"] == pytest.approx((6 / 7 * 4 / 5 * 2 / 3 * 1e-15) ** (1 / 4), rel=1e-6)


@needs_ziamath
def test_rendered_equality_of_formulas() -> None:
    cases = [
        EvalCase(r"\frac{1}{2}", (), (r"{1 \over 2}", r"\frac 12"), ()),
        EvalCase("$ a+b $", (), ("a + b",), ()),
        EvalCase("a+c", (), ("a + b",), ()),
        EvalCase(r"\left(", (), ("a",), ()),
        EvalCase("a", (), (r"\left(",), ()),
    ]
    scored = score_latex(cases)
    assert [one.get("rendered") for one in scored.per_sample] == [1, 1, 0, 0, None]
    assert scored.scores["rendered_share"] == pytest.approx(4 / 5)
    assert scored.scores["rendered"] == pytest.approx(2 / 4)


@needs_ziamath
def test_invalid_formulas_have_no_rendering() -> None:
    invalid = [
        *("", r"\left(", "a & b", "\ud800", "a\x00b"),
        "{" * 1500 + "x" + "}" * 1500,
        "x^" * 900,
        r"\begin{array}{" + "c" * 1500 + "}" + "&" * 1500 + r"\end{array}",
        "x" * (MAX_FORMULA_LENGTH + 1),
        # Takes too long.
        r"\frac{" * 80 + "x" + "}{y}" * 80,
    ]
    valid = (r"\frac{a}{b}", r"\frac ab", r"\frac{b}{a}")
    renderings = render_digests([*invalid, *valid])
    assert {formula: renderings[formula] for formula in invalid} == dict.fromkeys(invalid)
    first, same, other = (renderings[one] for one in valid)
    assert None not in (first, other)
    assert first == same != other
