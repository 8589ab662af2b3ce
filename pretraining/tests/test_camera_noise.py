"""Camera noise, text colors, and boxes of words in the fonts of pretraining."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from synthetic_tasks import backgrounds, camera_noise, canvas, fonts

WHITE = (255, 255, 255)


def _white(angle=0.0, size=(200, 120)):
    return canvas.Canvas(Image.new("RGB", size, WHITE), WHITE, angle)


def _ink_bounds(image):
    """Bounds of what is dark enough to be ink, of black on white."""
    dark = 255 - np.asarray(image.convert("L"), dtype=int) >= canvas.INK_THRESHOLD
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize("angle", [0.0, 4.0])
def test_boxes_of_all_fonts_are_ink_bounds(installed_fonts, angle):
    for face in (face for faces in installed_fonts for face in faces):
        page = _white(angle)
        word = page.draw_text("Taghy", fonts.load_font(face, 23), 40, 70, (0, 0, 0))
        assert word.box == _ink_bounds(page.image), f"{face}"


def test_ink_has_contrast_on_any_background():
    rng = random.Random(0)
    for _ in range(500):
        page = backgrounds.make_canvas((30, 20), rng)
        ink = camera_noise.sample_ink(page.background, rng)
        difference = abs(backgrounds.compute_luma(ink) - backgrounds.compute_luma(page.background))
        assert difference >= camera_noise.MIN_CONTRAST, f"{ink} on {page.background}"


def test_camera_noise_preserves_size_and_content():
    rng = random.Random(2)
    page = backgrounds.make_canvas((64, 48), rng).image
    for _ in range(60):
        taken = camera_noise.apply_camera_noise(page, rng)
        assert (taken.size, taken.mode) == (page.size, "RGB")
        difference = np.abs(np.asarray(taken, dtype=int) - np.asarray(page, dtype=int))
        assert difference.mean() < 20
