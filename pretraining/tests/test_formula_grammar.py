"""The grammar of formulas: canonical labels, within their bounds, of every sign."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from synthetic_tasks import formula_grammar

from finesight.evaluate.metrics.latex.score import tokenize_latex


@pytest.fixture(scope="module")
def labels():
    rng = random.Random(0)
    return [formula_grammar.sample_formula(rng) for _ in range(20_000)]


def test_formula_lengths_are_within_bounds(labels):
    lengths = [len(label.split()) for label in labels]
    assert min(lengths) >= formula_grammar.MIN_TOKENS
    assert max(lengths) <= formula_grammar.MAX_TOKENS
    tenth, ninth = sorted(lengths)[len(lengths) // 10], sorted(lengths)[-len(lengths) // 10]
    assert tenth <= 9
    assert ninth >= 33


def test_labels_are_unique_per_formula(labels):
    written = set(labels)
    meant = {tuple(tokenize_latex(label)) for label in written}
    assert len(meant) == len(written), "two labels are one formula to TeX"


def test_labels_are_canonical(labels):
    for label in labels:
        tokens = label.split()
        assert " ".join(tokens) == label
        for script in ("^", "_"):
            after = [tokens[at + 1] for at, token in enumerate(tokens) if token == script]
            assert set(after) <= {"{"}, f"a script without braces in {label}"
        assert not re.search(r"\{ \}", label), f"an empty group in {label}"
        assert "^" not in _before_subscripts(tokens), f"a superscript comes first in {label}"
        assert tokens.count(r"\left") == tokens.count(r"\right")


def _before_subscripts(tokens):
    """What the groups belong to that end right before a subscript."""
    owners = []
    for at, token in enumerate(tokens):
        if token == "_" and tokens[at - 1] == "}":
            depth, start = 1, at - 1
            while depth:
                start -= 1
                depth += (tokens[start] == "}") - (tokens[start] == "{")
            owners.append(tokens[start - 1])
    return owners


def test_only_tall_content_gets_stretched_brackets(labels):
    stretched = re.compile(r"\\left (\S+) (.*?) \\right (\S+)")
    found = [match[2] for label in labels for match in stretched.finditer(label)]
    assert len(found) > 100
    tall = re.compile(r"\\(?:frac|sum|prod|int|oint) ")
    assert all(tall.search(inner) for inner in found)
    flat = formula_grammar.wrap_brackets(["x", "+", "y"], "(", ")")
    assert flat == ["(", "x", "+", "y", ")"]
    high = formula_grammar.wrap_brackets([r"\frac", "{", "x", "}", "{", "y", "}"], "(", ")")
    assert (high[:2], high[-2:]) == ([r"\left", "("], [r"\right", ")"])


def test_every_symbol_occurs(labels):
    counts = Counter(token for label in labels for token in label.split())
    unused = [sign for sign in formula_grammar.SYMBOLS if not counts[sign]]
    assert not unused, f"never written: {unused}"
    equal = {"o", "O", "I", r"\to", r"\le", r"\ge", r"\mid", r"\varepsilon", r"\vert"}
    assert not equal & set(counts)
    construct = {"{", "}", "_", "^", r"\frac", r"\sqrt", r"\left", r"\right", r"\mathbf"}
    assert set(counts) == {
        *formula_grammar.SYMBOLS,
        *construct,
        r"\mathcal",
        *formula_grammar.ACCENTS,
    }


def test_formulas_rarely_repeat(labels):
    assert len(set(labels)) > 0.97 * len(labels)
