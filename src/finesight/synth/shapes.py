"""Coloured shapes in several fills, each with the bounds of its ink."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from finesight.synth.drawn import Corners
from finesight.synth.sheet import INK, Colour

COLOURS: dict[str, Colour] = {
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
"""A solid fill is never said."""

HOLLOW = ("square", "rectangle", "triangle", "diamond", "hexagon")
"""What can be hollow; a hollow circle is a ring."""

STRIPED = tuple(shape for shape in SHAPES if shape not in ("ring", "crescent"))
"""What can be striped: it has room enough."""

HOLDING = ("circle", "square", "diamond", "hexagon")
"""What another shape can be inside of."""

_FINER = 4
_CANVAS = 96
_LOW = 0.58
"""The shorter side of an oval or a rectangle, as a share of the longer."""

Point = tuple[float, float]


@dataclass(frozen=True, order=True)
class Kind:
    """What can be said of one shape on its own."""

    fill: str
    colour: str
    shape: str

    @property
    def words(self) -> str:
        fill = "" if self.fill == "solid" else f"{self.fill} "
        return f"{fill}{self.colour} {self.shape}"


def draw(picture: Image.Image, kind: Kind, centre: Point, side: int, rng: random.Random) -> Corners:
    """Put a shape `side` pixels wide on the picture; gives the bounds of its ink."""
    cover = cover_of(kind, side)
    bounds = cover.point(_IS_INK).getbbox()
    assert bounds, f"a {kind.words} of {side} pixels has no ink"
    x, y = round(centre[0] - cover.width / 2), round(centre[1] - cover.height / 2)
    picture.paste(_shade(COLOURS[kind.colour], rng), (x, y), cover)
    return bounds[0] + x, bounds[1] + y, bounds[2] + x, bounds[3] + y


def cover_of(kind: Kind, side: int) -> Image.Image:
    """The cover (mode L, `side` by `side`) of the shape's ink."""
    whole = _whole(kind.shape)
    if kind.fill == "striped":
        whole = ImageChops.multiply(whole, _stripes())
        whole = ImageChops.lighter(whole, _rim(kind.shape, 0.88))
    elif kind.fill == "hollow":
        whole = _rim(kind.shape, 0.68)
    return whole.resize((side, side), Image.Resampling.BOX)


_IS_INK = [255 if cover >= INK else 0 for cover in range(256)]


def apart(first: Colour, second: Colour, least: float) -> bool:
    """Whether two colours differ by that much at least (Euclidean, of 441)."""
    return math.dist(first, second) >= least


def _shade(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, part + rng.randint(-12, 12))) for part in colour)
    return red, green, blue


@lru_cache
def _whole(shape: str) -> Image.Image:
    return _drawn(shape, 1.0)


@lru_cache
def _rim(shape: str, inner: float) -> Image.Image:
    """The shape without its middle."""
    return ImageChops.subtract(_whole(shape), _drawn(shape, inner))


def _drawn(shape: str, scale: float) -> Image.Image:
    side = _CANVAS * _FINER
    cover = Image.new("L", (side, side))
    draw = ImageDraw.Draw(cover)
    low, high = side * (1 - scale) / 2, side * (1 + scale) / 2 - 1
    flat = (high - low) * (1 - _LOW) / 2
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse((low, low, high, high), 255)
    elif shape == "oval":
        draw.ellipse((low, low + flat, high, high - flat), 255)
    else:
        points = _middled(_outline(shape), scale)
        draw.polygon([(x * side, y * side) for x, y in points], 255)
    if shape == "ring":
        edge = (high - low) * 0.22
        draw.ellipse((low + edge, low + edge, high - edge, high - edge), 0)
    elif shape == "crescent":
        bite = (high - low) * 0.3
        draw.ellipse((low + bite, low - bite / 4, high + bite, high + bite / 4 - bite / 2), 0)
    return cover


@lru_cache
def _stripes() -> Image.Image:
    """Slanted bars."""
    side = _CANVAS * _FINER
    cover = Image.new("L", (side, side))
    draw = ImageDraw.Draw(cover)
    pitch = side // 5
    for at in range(-side, side, pitch):
        draw.line(((at, side), (at + side, 0)), 255, pitch // 3)
    return cover


def _outline(shape: str) -> Sequence[Point]:
    """Corners of a shape in a box from (0, 0) to (1, 1)."""
    if shape == "star":
        return [_on_circle(corner / 10, 0.5 if corner % 2 == 0 else 0.21) for corner in range(10)]
    if shape == "hexagon":
        return [_on_circle(corner / 6, 0.5) for corner in range(6)]
    if shape == "heart":
        return [_on_heart(step / 60 * 2 * math.pi) for step in range(60)]
    return _OUTLINES[shape]


_EDGE = (1 - _LOW) / 2
_NEAR, _FAR = 0.35, 0.65
_OUTLINES: dict[str, Sequence[Point]] = {
    "square": ((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)),
    "rectangle": ((0, _EDGE), (1, _EDGE), (1, 1 - _EDGE), (0, 1 - _EDGE)),
    "triangle": ((0.5, 0.06), (1, 0.94), (0, 0.94)),
    "diamond": ((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)),
    "cross": (
        *((_NEAR, 0), (_FAR, 0), (_FAR, _NEAR), (1, _NEAR), (1, _FAR), (_FAR, _FAR)),
        *((_FAR, 1), (_NEAR, 1), (_NEAR, _FAR), (0, _FAR), (0, _NEAR), (_NEAR, _NEAR)),
    ),
    "arrow": (
        *((0, 0.36), (0.55, 0.36), (0.55, 0.12), (1, 0.5)),
        *((0.55, 0.88), (0.55, 0.64), (0, 0.64)),
    ),
}


def _on_circle(turn: float, reach: float) -> Point:
    """The point at a share of a whole turn from the top."""
    angle = 2 * math.pi * (turn - 0.25)
    return 0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle)


def _on_heart(angle: float) -> Point:
    across = 16 * math.sin(angle) ** 3
    up = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)
    return 0.5 + across / 34, 0.48 - (up - math.cos(4 * angle)) / 34


def _middled(points: Sequence[Point], scale: float) -> list[Point]:
    """Scaled about the mean of the corners, which for a triangle lies below the middle."""
    x = sum(point[0] for point in points) / len(points)
    y = sum(point[1] for point in points) / len(points)
    return [(x + (px - x) * scale, y + (py - y) * scale) for px, py in points]
