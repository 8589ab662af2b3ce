"""Scenes of colored shapes in the cells of a grid."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from synthetic_tasks.backgrounds import make_canvas, round_up_size
from synthetic_tasks.canvas import INK_LOOKUP, Canvas, Color, PixelBox

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

MAX_DESCRIBED_SHAPES = 4
"""Maximum number of shapes in a described scene, not counting a nested shape."""

LARGE_SIZE_RANGE, SMALL_SIZE_RANGE = (0.82, 0.92), (0.42, 0.5)
"""Side lengths of large and small shapes, as fractions of their grid cell.

The ranges are separated, so that comparisons of size are unambiguous.
"""

_COUNT_WEIGHTS = (1, 3, 3, 2)
"""Sampling weights of one to MAX_DESCRIBED_SHAPES shapes in a described scene."""

_MIN_COLOR_DISTANCE = 110.0

_MIN_SHAPE_SIZE = 20
"""Minimum side length of a shape in pixels.

Smaller hexagons would resemble circles.
"""

_CELL_SIZE_RANGE = (48, 88)
_MAX_IMAGE_SIZE = 288


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


@dataclass(frozen=True)
class PlacedShape:
    """A shape at a position in the grid of a scene.

    `cell` is (column, row). `container` is the shape that surrounds this one, or None.
    """

    kind: ShapeKind
    cell: tuple[int, int]
    is_large: bool
    box: PixelBox
    container: ShapeKind | None = None


@dataclass(frozen=True)
class ShapeScene:
    image: Image.Image
    shapes: tuple[PlacedShape, ...]

    @property
    def outer_shapes(self) -> list[PlacedShape]:
        """Shapes that are not inside another shape, in row-major order."""
        return [shape for shape in self.shapes if shape.container is None]


def compose_scene(rng: random.Random, *, crowded: bool) -> ShapeScene:
    """Compose shapes in the cells of a grid, in row-major order.

    A scene has up to MAX_DESCRIBED_SHAPES distinct shapes and possibly a nested one. With `crowded`
    it has many shapes of few kinds.
    """
    canvas, cell, (columns, rows) = _make_grid(rng, 3 if crowded else 2)
    cells = [(x, y) for y in range(rows) for x in range(columns)]
    num_shapes = (
        rng.randint(1, len(cells)) if crowded else rng.choices((1, 2, 3, 4), _COUNT_WEIGHTS)[0]
    )
    chosen_cells = rng.sample(cells, min(num_shapes, len(cells)))
    chosen_cells.sort(key=lambda cell_xy: (cell_xy[1], cell_xy[0]))
    kinds = _sample_kinds(canvas, len(chosen_cells), rng, crowded=crowded)
    placed = []
    for kind, cell_xy in zip(kinds, chosen_cells, strict=True):
        is_large = rng.random() < 0.5
        side = round(cell * rng.uniform(*(LARGE_SIZE_RANGE if is_large else SMALL_SIZE_RANGE)))
        margin = (cell - side) / 2
        center = tuple((axis + 0.5) * cell + rng.uniform(-margin, margin) / 2 for axis in cell_xy)
        box = draw_shape(canvas.image, kind, (center[0], center[1]), side, rng)
        placed.append(PlacedShape(kind, cell_xy, is_large, box))
    if not crowded and rng.random() < 0.3:
        placed += _add_inner_shape(canvas, placed, rng)
    return ShapeScene(canvas.image, tuple(placed))


def _make_grid(rng: random.Random, min_columns: int) -> tuple[Canvas, int, tuple[int, int]]:
    """Create the canvas and grid of a scene.

    Returns the canvas, the cell size in pixels, and the numbers of columns and rows.
    """
    cell = rng.randint(*_CELL_SIZE_RANGE)
    max_columns = min(4, _MAX_IMAGE_SIZE // cell)
    columns = rng.randint(min(min_columns, max_columns), max_columns)
    rows = rng.randint(1 if min_columns == 2 else 2, min(3, _MAX_IMAGE_SIZE // cell))
    size = round_up_size(cell * columns, cell * rows, rng)
    return make_canvas(size, rng, pale_fraction=0.75), cell, (columns, rows)


def _sample_kinds(
    canvas: Canvas, num_shapes: int, rng: random.Random, *, crowded: bool
) -> list[ShapeKind]:
    """Sample kinds of shapes that are visible on the background.

    No two kinds have the same color and shape. With `crowded`, a few kinds are repeated; otherwise
    each kind occurs once.
    """
    colors = [
        name
        for name, rgb in COLORS.items()
        if are_distinct(rgb, canvas.background, _MIN_COLOR_DISTANCE)
    ]
    num_kinds = rng.randint(1, min(4, num_shapes)) if crowded else num_shapes
    chosen: dict[tuple[str, str], ShapeKind] = {}
    while len(chosen) < num_kinds:
        kind = _sample_kind(rng, rng.choice(colors))
        chosen.setdefault((kind.color, kind.shape), kind)
    kinds = list(chosen.values())
    return [rng.choice(kinds) for _ in range(num_shapes)] if crowded else kinds


def _sample_kind(rng: random.Random, color: str) -> ShapeKind:
    shape = rng.choice(SHAPES)
    weights = (8.0, 1.5 * (shape in STRIPED_SHAPES), 1.5 * (shape in HOLLOW_SHAPES))
    fill = rng.choices(FILLS, weights)[0]
    return ShapeKind(fill, color, shape)


def _add_inner_shape(
    canvas: Canvas, placed: Sequence[PlacedShape], rng: random.Random
) -> list[PlacedShape]:
    """Add a small shape inside a large solid one, if the scene has one."""
    containers = [
        shape
        for shape in placed
        if shape.is_large
        and shape.kind.shape in CONTAINER_SHAPES
        and shape.kind.fill == "solid"
        and _max_inner_size(shape) >= _MIN_SHAPE_SIZE
    ]
    if not containers:
        return []
    container = rng.choice(containers)
    background = COLORS[container.kind.color]
    taken = {(shape.kind.color, shape.kind.shape) for shape in placed}
    candidates = [
        ShapeKind("solid", name, shape)
        for name, rgb in COLORS.items()
        for shape in SHAPES
        if are_distinct(rgb, background, _MIN_COLOR_DISTANCE + 40) and (name, shape) not in taken
    ]
    kind = rng.choice(candidates)
    side = round(
        rng.uniform(
            max(_MIN_SHAPE_SIZE, 0.87 * _max_inner_size(container)), _max_inner_size(container)
        )
    )
    x1, y1, x2, y2 = container.box
    box = draw_shape(canvas.image, kind, ((x1 + x2) / 2, (y1 + y2) / 2), side, rng)
    return [PlacedShape(kind, container.cell, False, box, container=container.kind)]


def _max_inner_size(container: PlacedShape) -> float:
    """Return the maximum side length of a shape nested in a container.

    It leaves a visible margin.
    """
    x1, y1, x2, y2 = container.box
    return 0.46 * min(x2 - x1, y2 - y1)


def draw_shape(
    image: Image.Image, kind: ShapeKind, center: Point, size: int, rng: random.Random
) -> PixelBox:
    """Draw a shape on an image and return its bounding box.

    `size` is the width in pixels.
    """
    mask = render_mask(kind, size)
    bounds = mask.point(INK_LOOKUP).getbbox()
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
