"""Shapes: their boxes are the bounds of their ink, and no two look alike."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from finesight.synth import shapes
from finesight.synth.canvas import INK_THRESHOLD

KINDS = [
    shapes.ShapeKind(fill, "black", shape)
    for fill, able in (
        ("solid", shapes.SHAPES),
        ("striped", shapes.STRIPED_SHAPES),
        ("hollow", shapes.HOLLOW_SHAPES),
    )
    for shape in able
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.phrase)
@pytest.mark.parametrize("side", [22, 71])
def test_box_is_the_ink_bounds(kind, side):
    cover = np.asarray(shapes.render_mask(kind, side), dtype=int) >= INK_THRESHOLD
    image = Image.new("RGB", (160, 140), (255, 255, 255))
    x1, y1, x2, y2 = shapes.draw_shape(image, kind, (80.5, 66), side, random.Random(0))
    drawn = np.asarray(image.convert("L"), dtype=int) < 255 - INK_THRESHOLD + 12
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (x2 - x1, y2 - y1) == (
        np.ptp(np.flatnonzero(cover.any(0))) + 1,
        np.ptp(np.flatnonzero(cover.any(1))) + 1,
    )
    ink = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    # The shade of black is up to 12 off, which moves the bounds of faint ink by a pixel at most.
    assert np.abs(ink - (x1, y1, x2, y2)).max() <= 1


def test_all_kinds_look_different():
    covers = {kind: np.asarray(shapes.render_mask(kind, 24), dtype=float) / 255 for kind in KINDS}
    for first, second in combinations(KINDS, 2):
        difference = np.abs(covers[first] - covers[second]).mean()
        assert difference > 0.04, f"{first.phrase} and {second.phrase} differ by {difference}"


def test_all_colors_are_distinct():
    for first, second in combinations(shapes.COLORS.values(), 2):
        assert shapes.are_distinct(first, second, 60), f"{first} and {second} are too near"


def test_solid_fill_is_omitted_from_phrase():
    assert shapes.ShapeKind("solid", "red", "star").phrase == "red star"
    assert shapes.ShapeKind("hollow", "red", "square").phrase == "hollow red square"
