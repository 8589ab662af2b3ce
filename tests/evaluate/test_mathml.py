"""Tests of the conversion of generated formulas to safe MathML."""

import json
import random
from collections.abc import Iterator

import pytest
from browser import XSS_PAYLOADS

from finesight.evaluate.mathml import (
    ALLOWED_ATTRIBUTES,
    ALLOWED_ELEMENTS,
    MAX_FORMULA_CHARS,
    MathMLTree,
    convert_formula,
)

pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")


def pieces(tree: MathMLTree) -> Iterator[MathMLTree]:
    """Yield an element and its descendants."""
    yield tree
    for child in tree[2:]:
        if isinstance(child, list):
            yield from pieces(child)


def texts(tree: MathMLTree) -> str:
    return "".join(child for one in pieces(tree) for child in one[2:] if isinstance(child, str))


def convert(source: str) -> MathMLTree:
    tree = convert_formula(source)
    assert tree is not None, source
    return tree


@pytest.mark.parametrize(
    "source", [r"\frac{a}{b}", r"$\frac{a}{b}$", r"$$\frac ab$$", r"\[\frac{a}{b}\]"]
)
def test_latex_becomes_mathml(source: str) -> None:
    tree = convert(source)
    assert tree[:2] == ["math", {"displaystyle": "true"}]
    assert "mfrac" in [one[0] for one in pieces(tree)]
    assert texts(tree) == "ab"
    assert texts(convert(r"\alpha \leq \infty")) == "α≤∞"


@pytest.mark.parametrize(
    "source",
    [
        *("", "   ", r"\frac{", r"\left( x", "x^2^2", r"\begin{array}{c} 1", "{" * 500),
        "x" * (MAX_FORMULA_CHARS + 1),
        r"\newcommand{\a}{\b\b}\newcommand{\b}{xx}\a",
        r"\def\a{\a\a}\a",
        r"\let\x=\y",
        "x^{" * 200 + "}" * 200,
    ],
)
def test_invalid_latex_returns_none(source: str) -> None:
    assert convert_formula(source) is None


@pytest.mark.parametrize(
    "source",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(javascript:alert(1))}{x}",
        r"\class{x\" onload=\"alert(1)}{x}",
        r"\color{red;background:url(x)}{x}",
        r"\textcolor{expression(alert(1))}{x}",
        r"\hspace{99999em}",
        r"\raise{999em}{x}",
        *(rf"\text{{{payload}}}" for payload in XSS_PAYLOADS),
        *XSS_PAYLOADS,
    ],
)
def test_only_mathml_elements_and_attributes(source: str) -> None:
    tree = convert_formula(source)
    for name, attributes, *_ in pieces(tree) if tree else ():
        assert name in ALLOWED_ELEMENTS
        assert isinstance(attributes, dict)
        for key, value in attributes.items():
            assert ALLOWED_ATTRIBUTES[key].fullmatch(value), (key, value)
    assert "href" not in json.dumps([one[1] for one in pieces(tree)] if tree else "")


def test_random_input_does_not_crash() -> None:
    chance = random.Random(0)
    words = [*r"\{}[]()^_&$#%~'|<>", r"\frac", r"\left", r"\right", r"\begin{array}", r"\\"]
    words += [r"\end{array}", r"\sqrt", r"\text{", r"\color", r"\hspace", r"\not", "x", "1", " "]
    found = [
        convert_formula("".join(chance.choices(words, k=chance.randint(1, 40)))) for _ in range(500)
    ]
    assert any(found)
    assert not all(found)
