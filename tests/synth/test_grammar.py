"""The grammar of formulas: canonical labels, within their bounds, of every sign."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from finesight.evaluate.latex import latex_tokens
from finesight.synth import grammar


@pytest.fixture(scope="module")
def labels():
    rng = random.Random(0)
    return [grammar.formula(rng) for _ in range(20_000)]


def test_lengths_are_within_bounds_and_spread(labels):
    lengths = [len(label.split()) for label in labels]
    assert min(lengths) >= grammar.SHORTEST
    assert max(lengths) <= grammar.LONGEST
    tenth, ninth = sorted(lengths)[len(lengths) // 10], sorted(lengths)[-len(lengths) // 10]
    assert tenth <= 9
    assert ninth >= 33


def test_the_same_formula_is_never_written_in_two_ways(labels):
    written = set(labels)
    meant = {tuple(latex_tokens(label)) for label in written}
    assert len(meant) == len(written), "two labels are one formula to TeX"


def test_labels_are_in_canonical_form(labels):
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


def test_brackets_stretch_around_what_is_tall_only(labels):
    stretched = re.compile(r"\\left (\S+) (.*?) \\right (\S+)")
    found = [match[2] for label in labels for match in stretched.finditer(label)]
    assert len(found) > 100
    tall = re.compile(r"\\(?:frac|sum|prod|int|oint) ")
    assert all(tall.search(inner) for inner in found)
    flat = grammar.in_brackets(["x", "+", "y"], "(", ")")
    assert flat == ["(", "x", "+", "y", ")"]
    high = grammar.in_brackets([r"\frac", "{", "x", "}", "{", "y", "}"], "(", ")")
    assert (high[:2], high[-2:]) == ([r"\left", "("], [r"\right", ")"])


def test_every_sign_occurs_and_none_that_looks_like_another(labels):
    counts = Counter(token for label in labels for token in label.split())
    unused = [sign for sign in grammar.SYMBOLS if not counts[sign]]
    assert not unused, f"never written: {unused}"
    alike = {"o", "O", "I", r"\to", r"\le", r"\ge", r"\mid", r"\varepsilon", r"\vert"}
    assert not alike & set(counts)
    construct = {"{", "}", "_", "^", r"\frac", r"\sqrt", r"\left", r"\right", r"\mathbf"}
    assert set(counts) == {*grammar.SYMBOLS, *construct, r"\mathcal", *grammar.ACCENTS}


def test_formulas_hardly_repeat(labels):
    assert len(set(labels)) > 0.97 * len(labels)
