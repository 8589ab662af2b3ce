"""Shapes: their boxes are the bounds of their ink, and no two look alike."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from finesight.synth import shapes
from finesight.synth.sheet import INK

KINDS = [
    shapes.Kind(fill, "black", shape)
    for fill, able in (
        ("solid", shapes.SHAPES),
        ("striped", shapes.STRIPED),
        ("hollow", shapes.HOLLOW),
    )
    for shape in able
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.words)
@pytest.mark.parametrize("side", [22, 71])
def test_a_box_is_the_bounds_of_the_ink(kind, side):
    cover = np.asarray(shapes.cover_of(kind, side), dtype=int) >= INK
    picture = Image.new("RGB", (160, 140), (255, 255, 255))
    x1, y1, x2, y2 = shapes.draw(picture, kind, (80.5, 66), side, random.Random(0))
    drawn = np.asarray(picture.convert("L"), dtype=int) < 255 - INK + 12
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (x2 - x1, y2 - y1) == (
        np.ptp(np.flatnonzero(cover.any(0))) + 1,
        np.ptp(np.flatnonzero(cover.any(1))) + 1,
    )
    ink = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    # The shade of black is up to 12 off, which moves the bounds of faint ink by a pixel at most.
    assert np.abs(ink - (x1, y1, x2, y2)).max() <= 1


def test_no_two_kinds_look_alike():
    covers = {kind: np.asarray(shapes.cover_of(kind, 24), dtype=float) / 255 for kind in KINDS}
    for first, second in combinations(KINDS, 2):
        difference = np.abs(covers[first] - covers[second]).mean()
        assert difference > 0.04, f"{first.words} and {second.words} differ by {difference}"


def test_no_two_colours_are_near():
    for first, second in combinations(shapes.COLOURS.values(), 2):
        assert shapes.apart(first, second, 60), f"{first} and {second} are too near"


def test_words_leave_a_solid_fill_out():
    assert shapes.Kind("solid", "red", "star").words == "red star"
    assert shapes.Kind("hollow", "red", "square").words == "hollow red square"
