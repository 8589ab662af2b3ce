from __future__ import annotations

import pytest

from finesight.evaluate import drawing
from finesight.evaluate.drawing import LONGEST, available, drawings

pytestmark = pytest.mark.skipif(not available(), reason="ziamath is not installed")


def test_the_same_drawing_has_the_same_digest():
    same, other = (r"\frac{a}{b}", r"\frac ab"), r"\frac{b}{a}"
    looks = drawings([*same, other])
    assert None not in looks.values()
    assert looks[same[0]] == looks[same[1]] != looks[other]


@pytest.mark.parametrize(
    "formula",
    [
        "",
        r"\left(",
        "a & b",
        "{" * 1500 + "x" + "}" * 1500,
        "x^" * 900,
        r"\begin{array}{" + "c" * 1500 + "}" + "&" * 1500 + r"\end{array}",
        "x" * (LONGEST + 1),
        "\ud800",
        "a\x00b",
    ],
    ids=["empty", "open", "ampersand", "deep", "scripts", "wide", "long", "surrogate", "null"],
)
def test_what_cannot_be_drawn_has_no_drawing_and_harms_no_other(formula):
    looks = drawings([formula, "y", "z"])
    assert looks[formula] is None
    assert looks["y"] != looks["z"]
    assert None not in (looks["y"], looks["z"])


def test_a_formula_that_takes_for_ever_is_given_up():
    nested = r"\frac{" * 80 + "x" + "}{y}" * 80
    assert drawings([nested, "w"])[nested] is None


def test_a_child_that_something_else_has_ended_is_one_that_falls_silent():
    with drawing._child() as child:
        child.kill()
        child.wait()
        assert drawing._asked(child, "x") == ""
