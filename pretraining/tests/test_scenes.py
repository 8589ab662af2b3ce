"""Scenes and shapes: boxes are the bounds of their ink, and no two look alike."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from synthetic_tasks import scenes
from synthetic_tasks.canvas import INK_THRESHOLD
from synthetic_tasks.scenes import COLORS, CONTAINER_SHAPES, are_distinct

KINDS = [
    scenes.ShapeKind(fill, "black", shape)
    for fill, able in (
        ("solid", scenes.SHAPES),
        ("striped", scenes.STRIPED_SHAPES),
        ("hollow", scenes.HOLLOW_SHAPES),
    )
    for shape in able
]

SIMPLE = [scenes.compose_scene(random.Random(number), crowded=False) for number in range(300)]
CROWDS = [scenes.compose_scene(random.Random(number), crowded=True) for number in range(150)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [22, 71])
def test_box_is_the_ink_bounds(kind, side):
    cover = np.asarray(scenes.render_mask(kind, side), dtype=int) >= INK_THRESHOLD
    image = Image.new("RGB", (160, 140), (255, 255, 255))
    x1, y1, x2, y2 = scenes.draw_shape(image, kind, (80.5, 66), side, random.Random(0))
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
    covers = {kind: np.asarray(scenes.render_mask(kind, 24), dtype=float) / 255 for kind in KINDS}
    for first, second in combinations(KINDS, 2):
        difference = np.abs(covers[first] - covers[second]).mean()
        assert difference > 0.04, f"{first.phrase} and {second.phrase} differ by {difference}"


def test_all_colors_are_distinct():
    for first, second in combinations(scenes.COLORS.values(), 2):
        assert scenes.are_distinct(first, second, 60), f"{first} and {second} are too near"


def test_solid_fill_is_omitted_from_phrase():
    assert scenes.ShapeKind("solid", "red", "star").phrase == "red star"
    assert scenes.ShapeKind("hollow", "red", "square").phrase == "hollow red square"


def _center(corners):
    return (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2


def test_boxes_are_inside_the_image_and_disjoint():
    for made in SIMPLE + CROWDS:
        width, height = made.image.size
        for number, shape in enumerate(made.shapes):
            x1, y1, x2, y2 = shape.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            for other in made.shapes[:number]:
                u1, v1, u2, v2 = other.box
                meet = x1 < u2 and u1 < x2 and y1 < v2 and v1 < y2
                assert meet == (shape.container == other.kind), f"{shape} and {other}"


def test_scene_images_are_small():
    sides = [side for made in SIMPLE + CROWDS for side in made.image.size]
    assert max(sides) <= 308
    assert min(sides) >= 48


def test_container_shapes_are_large_and_solid():
    inner = [(made, shape) for made in SIMPLE for shape in made.shapes if shape.container]
    assert len(inner) > 20
    for made, shape in inner:
        holder = next(each for each in made.shapes if each.kind == shape.container)
        assert holder.is_large
        assert holder.kind.shape in CONTAINER_SHAPES
        assert holder.kind.fill == "solid"
        assert are_distinct(COLORS[shape.kind.color], COLORS[holder.kind.color], 100)


def test_described_shapes_have_unique_color_and_shape():
    for made in SIMPLE:
        result = {(shape.kind.color, shape.kind.shape) for shape in made.shapes}
        assert len(result) == len(made.shapes)


def test_colors_are_visible():
    """A loop, as the scenes are random."""
    for made in SIMPLE[:100]:
        for shape in made.shapes:
            if shape.kind.fill == "solid" and shape.kind.shape in ("square", "circle", "hexagon"):
                holds = any(other.container == shape.kind for other in made.shapes)
                x, y = _center(shape.box)
                pixel = made.image.getpixel((int(x), int(y)))
                assert holds or not are_distinct(pixel, COLORS[shape.kind.color], 25), shape
