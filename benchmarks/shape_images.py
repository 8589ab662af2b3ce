"""Generated images of shapes, with labels and boxes in a foreign file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from finesight.files.storage import write_folder

CELL_SIZE = 56
"""Pixels of a side of the cells in which shapes lie."""

GRID_CELLS = 3
"""Cells along each side of an image."""

IMAGE_SIZE = CELL_SIZE * GRID_CELLS
"""Pixels along each side of an image."""

LABELS_FILE = "labels.jsonl"
"""The foreign file, with a row for each image."""

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 210, 40),
    "orange": (255, 127, 14),
    "purple": (140, 60, 190),
}

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

MAX_SHAPES = 2
"""Shapes in an image."""

SIZES = (40, 52)
"""Pixels of a side of a shape's box."""

_SUPERSAMPLING = 4
"""Drawn so many times larger and then reduced, for smooth edges."""

PixelBox = tuple[int, int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class ColoredShape:
    """A coloured shape that fills the box `xyxy` (pixels, origin top left)."""

    color: str
    name: str
    xyxy: PixelBox

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.name}"


def write_shape_images(target: Path, num_images: int, seed: int) -> Path:
    """Write `num_images` images of one to MAX_SHAPES shapes, and `labels.jsonl`, to a new folder.

    A row has `image` (a path relative to the file), `shapes` (their names, from left to right, in a
    column from the top) and `boxes` (x, y, width, height in pixels). The same seed gives the same
    files.

    Raises:
        UserError: `target` exists.
    """
    rng = random.Random(seed)
    with write_folder(target) as folder:
        (folder / "images").mkdir()
        rows = []
        for number in range(num_images):
            shapes = _random_shapes(rng)
            name = f"images/{number:04}.png"
            draw_shapes(shapes, _random_background(rng)).save(folder / name)
            names, boxes = [s.phrase for s in shapes], [_as_xywh(s.xyxy) for s in shapes]
            rows.append({"image": name, "shapes": names, "boxes": boxes})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / LABELS_FILE).write_text(text, encoding="utf-8")
    return target


def _as_xywh(corners: PixelBox) -> list[int]:
    x1, y1, x2, y2 = corners
    return [x1, y1, x2 - x1, y2 - y1]


def _random_shapes(rng: random.Random) -> list[ColoredShape]:
    """One to MOST shapes in different cells, from left to right, in a column from the top."""
    cells = sorted(rng.sample(range(GRID_CELLS * GRID_CELLS), rng.randint(1, MAX_SHAPES)))
    return [_random_shape(rng, *divmod(cell, GRID_CELLS)) for cell in cells]


def _random_shape(rng: random.Random, column: int, row: int) -> ColoredShape:
    size = rng.choice(SIZES)
    x, y = (cell * CELL_SIZE + (CELL_SIZE - size) // 2 for cell in (column, row))
    return ColoredShape(rng.choice(tuple(COLORS)), rng.choice(SHAPES), (x, y, x + size, y + size))


def _random_background(rng: random.Random) -> tuple[int, int, int]:
    """A background that no shape's colour drowns in."""
    return rng.randint(205, 255), rng.randint(205, 255), rng.randint(205, 255)


def draw_shapes(shapes: Sequence[ColoredShape], background: tuple[int, int, int]) -> Image.Image:
    """Draw an RGB image, SIDE by SIDE, of these shapes."""
    large = Image.new("RGB", (IMAGE_SIZE * _SUPERSAMPLING, IMAGE_SIZE * _SUPERSAMPLING), background)
    for shape in shapes:
        _draw_shape(ImageDraw.Draw(large), shape)
    return large.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: ColoredShape) -> None:
    x1, y1, x2, y2 = (number * _SUPERSAMPLING for number in shape.xyxy)
    fill = COLORS[shape.color]
    box = (x1, y1, x2 - 1, y2 - 1)
    if shape.name == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape.name == "ring":
        canvas.ellipse(box, outline=fill, width=(x2 - x1) // 5)
    else:
        points = [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in _get_polygon(shape.name)]
        canvas.polygon(points, fill=fill)


def _get_polygon(name: str) -> Sequence[Point]:
    """Corners of a shape in a box from (0, 0) to (1, 1)."""
    if name == "star":
        return _fit_to_unit_box(list(_star()))
    near, far = 0.34, 0.66
    return {
        "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
        "triangle": ((0.5, 0), (1, 1), (0, 1)),
        "cross": (
            *((near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far)),
            *((far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near)),
        ),
    }[name]


def _star() -> Iterator[Point]:
    for corner in range(10):
        angle = math.pi * (corner / 5 - 0.5)
        reach = 1.0 if corner % 2 == 0 else 0.45
        yield reach * math.cos(angle), reach * math.sin(angle)


def _fit_to_unit_box(points: Sequence[Point]) -> list[Point]:
    """Moved and stretched so that they touch all four sides of the unit box."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return [((x - min(xs)) / width, (y - min(ys)) / height) for x, y in points]
