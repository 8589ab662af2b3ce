"""Sheets: the box of a word is the bounds of its ink, turned or not."""

from __future__ import annotations

import random

import numpy as np
from each_value import each
from PIL import Image

from finesight.synth import canvas

WHITE = (255, 255, 255)


def _white(angle=0.0, size=(200, 120)):
    return canvas.Canvas(Image.new("RGB", size, WHITE), WHITE, angle)


def _ink_bounds(image):
    """Bounds of what is dark enough to be ink, of black on white."""
    dark = 255 - np.asarray(image.convert("L"), dtype=int) >= canvas.INK_THRESHOLD
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@each("angle", [0.0, 3.5, -6.0, 20.0])
@each("text", ["Word", "jump", "...", "12:30"])
def test_box_is_the_ink_bounds(angle, text):
    page = _white(angle)
    word = page.draw_text(text, canvas.load_builtin_font(28), 60, 70, (0, 0, 0))
    assert word.text == text
    assert word.box == _ink_bounds(page.image)


def test_rotation_is_counterclockwise_about_center():
    left, right = (
        _white(10).draw_text("x", canvas.load_builtin_font(20), x, 60, (0, 0, 0)).box
        for x in (20, 160)
    )
    assert left[1] > right[1], "what lies to the left comes down"
    above, below = (
        _white(10).draw_text("x", canvas.load_builtin_font(20), 95, y, (0, 0, 0)).box
        for y in (25, 105)
    )
    assert above[0] < below[0], "what lies above goes to the left"


def test_text_that_does_not_fit_is_not_drawn():
    for left, base in ((-5, 60), (170, 60), (60, 5), (60, 119)):
        page = _white()
        assert page.draw_text("gaps", canvas.load_builtin_font(30), left, base, (0, 0, 0)) is None
        assert page.image.getextrema() == ((255, 255),) * 3


def test_spaces_have_no_box():
    assert _white().draw_text(" ", canvas.load_builtin_font(30), 60, 60, (0, 0, 0)) is None


def test_background_has_size_and_color():
    rng = random.Random(1)
    for _ in range(100):
        page = canvas.make_canvas((61, 37), rng)
        assert page.image.size == (61, 37)
        mean = np.asarray(page.image, dtype=float).mean((0, 1))
        assert np.abs(mean - page.background).max() < 40, f"{mean} on paper of {page.background}"
