"""Formula images: correct scripts, distinguishable symbols, labels that match the image."""

from __future__ import annotations

import random

import numpy as np
import pytest
from synthetic_tasks import formula_grammar, formula_recombination, formulas

FAMILIES = sorted(set(formulas.MATH_FONT_FAMILIES))

pytestmark = pytest.mark.usefixtures("mathtext")


def _ink(label, family="cm", size=24):
    return formulas.render_formula(label, family, size)


def test_spaces_do_not_end_scripts():
    assert formulas.to_mathtext(r"x ^ { 2 } + \alpha b") == r"x^{2}+\alpha b"
    assert _ink("x ^ { 2 }").height > _ink("x 2").height
    assert _ink("x _ { a b }").width < _ink("x a b").width


def test_outer_fractions_are_display_style():
    label = r"\frac { \frac { a } { b } } { c }"
    assert formulas.to_mathtext(label) == r"\dfrac {\frac {a}{b}}{c}"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_symbols_look_different(family):
    renderings = {}
    for sign in formula_grammar.SYMBOLS:
        cover = _ink(f"x {sign} y", family)
        key = (cover.size, cover.tobytes())
        assert key not in renderings, f"{sign} looks like {renderings[key]} in {family}"
        renderings[key] = sign


def test_different_formulas_look_different():
    rng = random.Random(0)
    labels = {formula_grammar.sample_formula(rng) for _ in range(250)}
    renderings = {(cover.size, cover.tobytes()) for cover in map(_ink, labels)}
    assert len(renderings) == len(labels)


def test_formulas_render_in_every_font_family():
    rng = random.Random(1)
    for number in range(100):
        label = formula_grammar.sample_formula(rng)
        assert _ink(label, FAMILIES[number % len(FAMILIES)], 13).getbbox(), label


def test_wide_formulas_are_scaled_down():
    label = " + ".join("abcdefgh" * 2)
    assert _ink(label, size=28).width > formulas.MAX_WIDTH
    assert formulas.render_to_fit(label, "cm", 28).width <= formulas.MAX_WIDTH
    assert formulas.render_to_fit(" + ".join("abcdefgh" * 8), "cm", 28) is None


def test_images_have_dark_ink_on_light_background():
    for number in range(60):
        drawn = formulas.generate_formula(random.Random(number), "seen")
        width, height = drawn.image.size
        assert width <= formulas.MAX_WIDTH
        assert height <= formulas.MAX_HEIGHT
        pixels = np.asarray(drawn.image.convert("L"), dtype=int)
        assert np.median(pixels) > 180
        assert pixels.min() < 130
        assert drawn.task_kind == "formula"
        (label,) = drawn.answer
        assert formula_grammar.MIN_TOKENS <= len(label.split()) <= formula_grammar.MAX_TOKENS


LABELS = (
    r"\int _ { 0 } ^ { 1 } { \cal L } ( x ) d x = \frac { 1 } { 2 } \operatorname { s i n } x \, ,",
    r"\left( { \bf a } + \sqrt { b } \right) ^ { 2 } = x _ { i } ^ { \prime } \ .",
)


def test_parts_of_a_label_are_its_tokens():
    parts = formula_recombination.parse_formula(LABELS[1])
    assert [formula_recombination.format_formula([part]) for part in parts] == [
        r"\left( { \bf a } + \sqrt { b } \right) ^ { 2 }",
        "=",
        r"x _ { i } ^ { \prime }",
        "\\",
        ".",
    ]
    with pytest.raises(ValueError, match="no }"):
        formula_recombination.parse_formula("{ a")


def test_recombined_formulas_have_the_parts_of_the_labels(monkeypatch):
    for name in ("MAX_LETTER_RATE", "ARGUMENT_RATE", "SCRIPT_RATE"):
        monkeypatch.setattr(formula_recombination, name, 0.0)
    recombiner = formula_recombination.FormulaRecombiner(LABELS)
    known = {part for label in LABELS for part in formula_recombination.parse_formula(label)}
    for number in range(20):
        latex, image = recombiner.sample(random.Random(number))
        assert set(formula_recombination.parse_formula(latex)) <= known
        assert image.getextrema()[0] < 130
        fitted = formula_recombination.fit_formula_image(image)
        assert not fitted.width % 28
        assert not fitted.height % 28


def test_recombined_formulas_vary_letters_arguments_and_scripts():
    recombiner = formula_recombination.FormulaRecombiner(LABELS)
    known = {part for label in LABELS for part in formula_recombination.parse_formula(label)}
    texts = [recombiner.sample(random.Random(number))[0] for number in range(60)]
    new = {part for text in texts for part in formula_recombination.parse_formula(text)} - known
    assert any(part[0] == r"\frac" for part in new)
    assert any(part[1:2] == ("_",) for part in new)
    assert all(r"\operatorname { s i n }" in text for text in texts if r"\operatorname" in text)


@pytest.mark.parametrize(
    ("latex", "is_drawable"),
    [
        (r"\left( \begin{array} { c c } { a } & { b } \\ { c } & { d } \end{array} \right)", True),
        (r"\Big[ x", False),
        (r"\Bigl [ \hspace { 3 m m } \sqrt [ 3 ] { \hat { x } } _ { \lim _ { n } } \Bigr ]", True),
        (r"\hspace { x }", False),
        (r"\unknown { x }", False),
        ("--", False),
        (r"x ^ { \prime } ^ { 2 }", False),
        (r"\sum \limits _ { i } ^ n \leftrightarrow \leftrightharpoons", True),
    ],
)
def test_undrawable_parts_are_recognized(latex, is_drawable):
    drawing = formula_recombination.FormulaDrawing(30.0)
    parts = formula_recombination.parse_formula(latex)
    assert all(map(drawing.is_drawable, parts)) is is_drawable
    # Arguments need no braces.
    words = ((r"\vec x", 1), (r"\mathrm d x", 2), (r"\sqrt x", 1), (r"\bf d x", 3))
    for text, num_parts in words:
        assert len(formula_recombination.parse_formula(text)) == num_parts
    # An error leaves no style behind.
    drawing.is_drawable(formula_recombination.parse_formula(r"{ \bf \unknown }")[0])
    digit = drawing._build_formula(formula_recombination.parse_formula("1")).children[1]
    assert digit.font != "bf"


def test_labels_that_cannot_be_parsed_are_left_out():
    labels = ("{ a", "{ " * 600 + "} " * 600, *LABELS)
    assert len(formula_recombination.FormulaRecombiner(labels)._formulas) == len(LABELS)


def test_arguments_of_arrays_and_delimiters_have_their_size():
    drawing, rng = formula_recombination.FormulaDrawing(30.0), random.Random(0)

    def height(latex):
        return drawing.draw(formula_recombination.parse_formula(latex), rng).height

    array = r"\begin{array} { c } { a } \\ { b } \end{array}"
    assert height(rf"\left( {array} \right)") > 1.2 * height(array)
    assert height(r"\Bigg (") > 1.5 * height(r"\left( a \right)")
