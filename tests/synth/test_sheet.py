"""Sheets: the box of a word is the bounds of its ink, turned or not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from finesight.synth import fonts, sheet

WHITE = (255, 255, 255)
FACE = fonts.faces("built-in")[0]


def _white(angle=0.0, size=(200, 120)):
    return sheet.Sheet(Image.new("RGB", size, WHITE), WHITE, angle)


def _ink_bounds(picture):
    """Bounds of what is dark enough to be ink, of black on white."""
    dark = 255 - np.asarray(picture.convert("L"), dtype=int) >= sheet.INK
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize("angle", [0.0, 3.5, -6.0, 20.0])
@pytest.mark.parametrize("text", ["Word", "jump", "...", "12:30"])
def test_a_box_is_the_bounds_of_the_ink(angle, text):
    page = _white(angle)
    word = page.write(text, fonts.load(FACE, 28), 60, 70, (0, 0, 0))
    assert word.text == text
    assert word.corners == _ink_bounds(page.picture)


@pytest.mark.parametrize("angle", [0.0, 4.0])
def test_boxes_of_faces_are_the_bounds_of_the_ink(installed_fonts, angle):
    for face in (face for faces in installed_fonts for face in faces):
        page = _white(angle)
        word = page.write("Taghy", fonts.load(face, 23), 40, 70, (0, 0, 0))
        assert word.corners == _ink_bounds(page.picture), f"{face}"


def test_a_turn_goes_about_the_centre_against_the_clock():
    left, right = (
        _white(10).write("x", fonts.load(FACE, 20), x, 60, (0, 0, 0)).corners for x in (20, 160)
    )
    assert left[1] > right[1], "what lies to the left comes down"
    above, below = (
        _white(10).write("x", fonts.load(FACE, 20), 95, y, (0, 0, 0)).corners for y in (25, 105)
    )
    assert above[0] < below[0], "what lies above goes to the left"


def test_what_does_not_fit_is_not_drawn():
    for left, base in ((-5, 60), (170, 60), (60, 5), (60, 119)):
        page = _white()
        assert page.write("gaps", fonts.load(FACE, 30), left, base, (0, 0, 0)) is None
        assert page.picture.getextrema() == ((255, 255),) * 3


def test_blanks_have_no_box():
    assert _white().write(" ", fonts.load(FACE, 30), 60, 60, (0, 0, 0)) is None


def test_ink_stands_out_from_any_paper():
    rng = random.Random(0)
    for _ in range(500):
        page = sheet.paper((30, 20), rng)
        ink = sheet.ink_on(page.paper, rng)
        difference = abs(sheet.brightness(ink) - sheet.brightness(page.paper))
        assert difference >= sheet.CONTRAST, f"{ink} on {page.paper}"


def test_papers_have_their_size_and_look_like_their_colour():
    rng = random.Random(1)
    for _ in range(100):
        page = sheet.paper((61, 37), rng)
        assert page.picture.size == (61, 37)
        mean = np.asarray(page.picture, dtype=float).mean((0, 1))
        assert np.abs(mean - page.paper).max() < 40, f"{mean} on paper of {page.paper}"


def test_the_camera_keeps_size_and_likeness():
    rng = random.Random(2)
    page = sheet.paper((64, 48), rng).picture
    for _ in range(60):
        taken = sheet.photographed(page, rng)
        assert (taken.size, taken.mode) == (page.size, "RGB")
        difference = np.abs(np.asarray(taken, dtype=int) - np.asarray(page, dtype=int))
        assert difference.mean() < 20
