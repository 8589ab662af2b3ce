"""Formulas from models: drawn where they can be, and never anything but formulas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PAYLOADS

from finesight.report.formulas import ATTRIBUTES, ELEMENTS, LONGEST, Formulas, Tree

pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")


def pieces(tree: Tree) -> Iterator[Tree]:
    """The element and all within."""
    yield tree
    for child in tree[2:]:
        if isinstance(child, list):
            yield from pieces(child)


def texts(tree: Tree) -> str:
    return "".join(child for one in pieces(tree) for child in one[2:] if isinstance(child, str))


def drawn(source: str) -> Tree:
    tree = Formulas().tree(source)
    assert tree is not None, source
    return tree


def names(tree: Tree) -> list[object]:
    return [one[0] for one in pieces(tree)]


@pytest.mark.parametrize(
    "source", [r"\frac{a}{b}", r"$\frac{a}{b}$", r"$$\frac ab$$", r"\[\frac{a}{b}\]"]
)
def test_a_formula_becomes_a_tree(source: str) -> None:
    tree = drawn(source)
    assert tree[:2] == ["math", {"displaystyle": "true"}]
    assert "mfrac" in names(tree)
    assert texts(tree) == "ab"


def test_symbols_are_characters() -> None:
    assert texts(drawn(r"\alpha \leq \infty")) == "α≤∞"


def test_all_real_formulas_are_drawn(shared: Path) -> None:
    file = shared / "data" / "latex_ocr" / "latex_ocr.jsonl"
    sources = [json.loads(line)["latex"] for line in file.read_text().splitlines()]
    formulas = Formulas()
    missing = [source for source in sources if formulas.tree(source) is None]
    assert len(sources) == 1000
    assert missing == []


@pytest.mark.parametrize(
    "source",
    [
        *("", "   ", r"\frac{", r"\left( x", "x^2^2", r"\begin{array}{c} 1", "{" * 500),
        "x" * (LONGEST + 1),
        r"\newcommand{\a}{\b\b}\newcommand{\b}{xx}\a",
        r"\def\a{\a\a}\a",
        r"\let\x=\y",
        "x^{" * 200 + "}" * 200,
    ],
)
def test_what_cannot_be_drawn_is_left_as_its_source(source: str) -> None:
    assert Formulas().tree(source) is None


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
        *(rf"\text{{{payload}}}" for payload in PAYLOADS),
        *PAYLOADS,
    ],
)
def test_nothing_but_elements_and_attributes_of_formulas(source: str) -> None:
    tree = Formulas().tree(source)
    for name, attributes, *_ in pieces(tree) if tree else ():
        assert name in ELEMENTS
        assert isinstance(attributes, dict)
        for key, value in attributes.items():
            assert ATTRIBUTES[key].fullmatch(value), (key, value)
    assert "href" not in json.dumps([one[1] for one in pieces(tree)] if tree else "")


def test_garbage_brings_nothing_down() -> None:
    chance = random.Random(0)
    words = [*r"\{}[]()^_&$#%~'|<>", r"\frac", r"\left", r"\right", r"\begin{array}", r"\\"]
    words += [r"\end{array}", r"\sqrt", r"\text{", r"\color", r"\hspace", r"\not", "x", "1", " "]
    formulas = Formulas()
    found = [
        formulas.tree("".join(chance.choices(words, k=chance.randint(1, 40)))) for _ in range(500)
    ]
    assert any(found)
    assert not all(found)
