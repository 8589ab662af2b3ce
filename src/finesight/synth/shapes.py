"""Drawing of colored shapes with several fills."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from finesight.synth.canvas import INK_THRESHOLD, Color
from finesight.synth.synthetic_sample import PixelBox

COLORS: dict[str, Color] = {
    "red": (214, 39, 40),
    "green": (40, 150, 50),
    "blue": (31, 80, 200),
    "yellow": (245, 215, 40),
    "orange": (250, 130, 20),
    "purple": (130, 50, 170),
    "pink": (245, 140, 190),
    "brown": (125, 75, 35),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
    "cyan": (40, 200, 215),
}

SHAPES = (
    *("circle", "oval", "square", "rectangle", "triangle", "diamond", "hexagon"),
    *("star", "cross", "heart", "crescent", "ring", "arrow"),
)

FILLS = ("solid", "striped", "hollow")
"""Fills of shapes.

Captions name a fill unless it is solid.
"""

HOLLOW_SHAPES = ("square", "rectangle", "triangle", "diamond", "hexagon")
"""Shapes that can be hollow.

A circle is excluded, because a hollow circle would be a ring.
"""

STRIPED_SHAPES = tuple(shape for shape in SHAPES if shape not in ("ring", "crescent"))
"""Shapes with enough area for stripes."""

CONTAINER_SHAPES = ("circle", "square", "diamond", "hexagon")
"""Shapes that can contain another shape."""

_SUPERSAMPLING = 4
_CANVAS_SIZE = 96
_FLAT_ASPECT = 0.58
"""Ratio of the shorter to the longer side of an oval or a rectangle."""

Point = tuple[float, float]


@dataclass(frozen=True, order=True)
class ShapeKind:
    """Kind of a shape: its fill, color and shape name."""

    fill: str
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        fill = "" if self.fill == "solid" else f"{self.fill} "
        return f"{fill}{self.color} {self.shape}"


def draw_shape(
    image: Image.Image, kind: ShapeKind, center: Point, size: int, rng: random.Random
) -> PixelBox:
    """Draw a shape on an image and return its bounding box.

    `size` is the width in pixels.
    """
    mask = render_mask(kind, size)
    bounds = mask.point(_INK_LOOKUP).getbbox()
    assert bounds, f"a {kind.phrase} of {size} pixels has no ink"
    x, y = round(center[0] - mask.width / 2), round(center[1] - mask.height / 2)
    image.paste(_jitter_color(COLORS[kind.color], rng), (x, y), mask)
    return bounds[0] + x, bounds[1] + y, bounds[2] + x, bounds[3] + y


def render_mask(kind: ShapeKind, size: int) -> Image.Image:
    """Render the coverage mask of a shape.

    Returns an image of mode L with `size` by `size` pixels.
    """
    mask = _full_mask(kind.shape)
    if kind.fill == "striped":
        mask = ImageChops.multiply(mask, _stripe_mask())
        mask = ImageChops.lighter(mask, _outline_mask(kind.shape, 0.88))
    elif kind.fill == "hollow":
        mask = _outline_mask(kind.shape, 0.68)
    return mask.resize((size, size), Image.Resampling.BOX)


_INK_LOOKUP = [255 if cover >= INK_THRESHOLD else 0 for cover in range(256)]


def are_distinct(first: Color, second: Color, min_distance: float) -> bool:
    """Return whether two colors have at least a Euclidean distance in RGB.

    The maximum distance of two colors is 441.
    """
    return math.dist(first, second) >= min_distance


def _jitter_color(color: Color, rng: random.Random) -> Color:
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in color)
    return red, green, blue


@lru_cache
def _full_mask(shape: str) -> Image.Image:
    return _draw_mask(shape, 1.0)


@lru_cache
def _outline_mask(shape: str, inner: float) -> Image.Image:
    """Render the mask of a hollow shape."""
    return ImageChops.subtract(_full_mask(shape), _draw_mask(shape, inner))


def _draw_mask(shape: str, scale: float) -> Image.Image:
    size = _CANVAS_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (size, size))
    drawer = ImageDraw.Draw(mask)
    low, high = size * (1 - scale) / 2, size * (1 + scale) / 2 - 1
    inset = (high - low) * (1 - _FLAT_ASPECT) / 2
    if shape in ("circle", "ring", "crescent"):
        drawer.ellipse((low, low, high, high), 255)
    elif shape == "oval":
        drawer.ellipse((low, low + inset, high, high - inset), 255)
    else:
        points = _scale_about_centroid(_get_polygon(shape), scale)
        drawer.polygon([(x * size, y * size) for x, y in points], 255)
    if shape == "ring":
        edge = (high - low) * 0.22
        drawer.ellipse((low + edge, low + edge, high - edge, high - edge), 0)
    elif shape == "crescent":
        offset = (high - low) * 0.3
        drawer.ellipse(
            (low + offset, low - offset / 4, high + offset, high + offset / 4 - offset / 2), 0
        )
    return mask


@lru_cache
def _stripe_mask() -> Image.Image:
    """Render the mask of diagonal stripes."""
    size = _CANVAS_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (size, size))
    drawer = ImageDraw.Draw(mask)
    pitch = size // 5
    for x in range(-size, size, pitch):
        drawer.line(((x, size), (x + size, 0)), 255, pitch // 3)
    return mask


def _get_polygon(shape: str) -> Sequence[Point]:
    """Return the corners of a polygonal shape in the unit square."""
    if shape == "star":
        return [
            _circle_point(corner / 10, 0.5 if corner % 2 == 0 else 0.21) for corner in range(10)
        ]
    if shape == "hexagon":
        return [_circle_point(corner / 6, 0.5) for corner in range(6)]
    if shape == "heart":
        return [_heart_point(step / 60 * 2 * math.pi) for step in range(60)]
    return _POLYGONS[shape]


_RECTANGLE_INSET = (1 - _FLAT_ASPECT) / 2
_CROSS_START, _CROSS_END = 0.35, 0.65
_POLYGONS: dict[str, Sequence[Point]] = {
    "square": ((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)),
    "rectangle": (
        (0, _RECTANGLE_INSET),
        (1, _RECTANGLE_INSET),
        (1, 1 - _RECTANGLE_INSET),
        (0, 1 - _RECTANGLE_INSET),
    ),
    "triangle": ((0.5, 0.06), (1, 0.94), (0, 0.94)),
    "diamond": ((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)),
    "cross": (
        *(
            (_CROSS_START, 0),
            (_CROSS_END, 0),
            (_CROSS_END, _CROSS_START),
            (1, _CROSS_START),
            (1, _CROSS_END),
            (_CROSS_END, _CROSS_END),
        ),
        *(
            (_CROSS_END, 1),
            (_CROSS_START, 1),
            (_CROSS_START, _CROSS_END),
            (0, _CROSS_END),
            (0, _CROSS_START),
            (_CROSS_START, _CROSS_START),
        ),
    ),
    "arrow": (
        *((0, 0.36), (0.55, 0.36), (0.55, 0.12), (1, 0.5)),
        *((0.55, 0.88), (0.55, 0.64), (0, 0.64)),
    ),
}


def _circle_point(fraction: float, radius: float) -> Point:
    """Return a point on a circle.

    `fraction` is the clockwise angle from the top as a fraction of the full circle.
    """
    angle = 2 * math.pi * (fraction - 0.25)
    return 0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)


def _heart_point(angle: float) -> Point:
    dx = 16 * math.sin(angle) ** 3
    dy = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)
    return 0.5 + dx / 34, 0.48 - (dy - math.cos(4 * angle)) / 34


def _scale_about_centroid(points: Sequence[Point], scale: float) -> list[Point]:
    """Scale a polygon about the mean of its corners.

    For a triangle, this point is below the center of the unit square.
    """
    x = sum(point[0] for point in points) / len(points)
    y = sum(point[1] for point in points) / len(points)
    return [(x + (px - x) * scale, y + (py - y) * scale) for px, py in points]
