"""Tests of rotated texts and their bounding boxes."""

import numpy as np
import pytest
from PIL import Image
from synthetic_tasks import canvas

from finesight.vision.drawing import load_builtin_font

WHITE = (255, 255, 255)


def make_page(angle=0.0):
    return canvas.Canvas(Image.new("RGB", (200, 120), WHITE), WHITE, angle)


def draw(page, text, left, base, size=20):
    return page.draw_text(text, load_builtin_font(size), left, base, (0, 0, 0))


def _ink_bounds(image):
    """Bounds of what is dark enough to be ink, of black on white."""
    dark = 255 - np.asarray(image.convert("L"), dtype=int) >= canvas.INK_THRESHOLD
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize("angle", [0.0, 3.5, -6.0, 20.0])
@pytest.mark.parametrize("text", ["Word", "jump", "...", "12:30"])
def test_box_is_the_ink_bounds(angle, text):
    page = make_page(angle)
    word = draw(page, text, 60, 70, 28)
    assert word.text == text
    assert word.box == _ink_bounds(page.image)


def test_rotation_is_counterclockwise_about_center():
    left, right = (draw(make_page(10), "x", x, 60).box for x in (20, 160))
    above, below = (draw(make_page(10), "x", 95, y).box for y in (25, 105))
    assert left[1] > right[1], "what lies to the left comes down"
    assert above[0] < below[0], "what lies above goes to the left"


def test_text_that_does_not_fit_is_not_drawn():
    for text, left, base in (
        *(("gaps", -5, 60), ("gaps", 170, 60), ("gaps", 60, 5), ("gaps", 60, 119)),
        (" ", 60, 60),
    ):
        page = make_page()
        assert draw(page, text, left, base, 30) is None
        assert page.image.getextrema() == ((255, 255),) * 3
