"""Formulas as pictures: scripts are scripts, what differs looks different, labels fit pictures."""

from __future__ import annotations

import random

import numpy as np
import pytest

from finesight.synth import formulas, grammar

FAMILIES = sorted(set(formulas.FAMILIES))

pytestmark = pytest.mark.usefixtures("mathtext")


def _ink(label, family="cm", size=24):
    return formulas.drawing(label, family, size)


def test_blanks_of_labels_do_not_cut_scripts_off():
    assert formulas.mathtext(r"x ^ { 2 } + \alpha b") == r"x^{2}+\alpha b"
    assert _ink("x ^ { 2 }").height > _ink("x 2").height
    assert _ink("x _ { a b }").width < _ink("x a b").width


def test_outer_fractions_are_drawn_large():
    label = r"\frac { \frac { a } { b } } { c }"
    assert formulas.mathtext(label) == r"\dfrac {\frac {a}{b}}{c}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_signs_look_the_same(family):
    looks = {}
    for sign in grammar.SYMBOLS:
        cover = _ink(f"x {sign} y", family)
        key = (cover.size, cover.tobytes())
        assert key not in looks, f"{sign} looks like {looks[key]} in {family}"
        looks[key] = sign


def test_no_two_formulas_look_the_same():
    rng = random.Random(0)
    labels = {grammar.formula(rng) for _ in range(250)}
    looks = {(cover.size, cover.tobytes()) for cover in map(_ink, labels)}
    assert len(looks) == len(labels)


def test_formulas_of_every_family_can_be_drawn():
    rng = random.Random(1)
    for number in range(100):
        label = grammar.formula(rng)
        assert _ink(label, FAMILIES[number % len(FAMILIES)], 13).getbbox(), label


def test_wide_formulas_are_drawn_smaller_and_too_wide_ones_not_at_all():
    label = " + ".join("abcdefgh" * 2)
    assert _ink(label, size=28).width > formulas.WIDEST
    assert formulas.fitted(label, "cm", 28).width <= formulas.WIDEST
    assert formulas.fitted(" + ".join("abcdefgh" * 8), "cm", 28) is None


def test_pictures_hold_dark_ink_on_pale_paper():
    for number in range(60):
        drawn = formulas.formula(random.Random(number), "seen")
        width, height = drawn.picture.size
        assert width <= formulas.WIDEST
        assert height <= formulas.TALLEST
        pixels = np.asarray(drawn.picture.convert("L"), dtype=int)
        assert np.median(pixels) > 180
        assert pixels.min() < 130
        assert drawn.kind == "formula"
        (label,) = drawn.answer
        assert grammar.SHORTEST <= len(label.split()) <= grammar.LONGEST
