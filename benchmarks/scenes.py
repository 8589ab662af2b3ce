"""Sources of boxes for measurements: real ones, and drawn ones of many kinds, held in memory."""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from finesight.check.conventions.edges import SIDE, Sides, small_grey

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from shape_pictures import COLOURS, SHAPES, Shape, draw

Corners = tuple[float, float, float, float]
Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class Item:
    """A sample: its picture's name, its size (height, width), its true boxes in pixels."""

    picture: Path
    size: tuple[int, int]
    boxes: tuple[Corners, ...]


class Gallery:
    """Pictures by name. Small grey copies are kept, drawn ones nowhere else; the sums over them,
    which are large, only until `forget`."""

    def __init__(self) -> None:
        self._greys: dict[Path, NDArray[np.uint8]] = {}
        self._sides: dict[Path, Sides] = {}

    def add(self, name: str, image: Image.Image) -> Path:
        """A drawn picture under a name."""
        path = Path(name)
        if max(image.size) > SIDE:
            image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        self._greys[path] = np.asarray(image.convert("L"))
        return path

    def look(self, path: Path) -> Sides:
        """A Look: a drawn picture, or a file, which is read once."""
        if path not in self._sides:
            if path not in self._greys:
                self._greys[path] = small_grey(path)
            self._sides[path] = Sides(self._greys[path])
        return self._sides[path]

    def forget(self) -> None:
        """Let the sums go."""
        self._sides.clear()


def real(folder: Path) -> dict[str, list[Item]]:
    """The real sources: words in photographs, lines on receipts, objects in photographs."""
    sources: dict[str, list[Item]] = {"words": [], "receipts": [], "objects": []}
    for line in (folder / "grounding/grounding.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        name = "words" if row["source"] == "icdar2015" else "receipts"
        size = row["height"], row["width"]
        item = Item(folder / "grounding" / row["image"], size, (tuple(row["bbox_xyxy"]),))
        sources[name].append(item)
    for line in (folder / "captions/captions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        labels: dict[str, list[Corners]] = {}
        for one in row["objects"]:
            labels.setdefault(one["label"], []).append(tuple(one["bbox_xyxy"]))
        size = row["height"], row["width"]
        path = folder / "captions" / row["image"]
        sources["objects"] += [Item(path, size, tuple(boxes)) for boxes in labels.values()]
    sources["words and receipts"] = sources["words"] + sources["receipts"]
    return sources


def quickstart(gallery: Gallery, count: int, rng: random.Random) -> Iterator[Item]:
    """Shapes in the cells of a small square."""
    for number in range(count):
        cells = rng.sample(range(9), rng.randint(1, 2))
        shapes = []
        for cell in cells:
            size = rng.choice((40, 52))
            x, y = (place * 56 + (56 - size) // 2 for place in divmod(cell, 3))
            colour = rng.choice(tuple(COLOURS))
            shapes.append(Shape(colour, rng.choice(SHAPES), (x, y, x + size, y + size)))
        path = gallery.add(f"quickstart/{number}", draw(shapes, (230, 240, 220)))
        yield Item(path, (168, 168), tuple(shape.xyxy for shape in shapes))


@dataclass(frozen=True)
class Scene:
    """How to draw objects: the picture's size, where a box lies and how large it is (shares of the
    picture), how many are drawn and how many of them labelled, and the background."""

    size: Callable[[random.Random], Size]
    place: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    extent: tuple[float, float] = (0.08, 0.45)
    drawn: tuple[int, int] = (2, 6)
    labelled: int = 3
    background: str = "rough"


def scenes(
    gallery: Gallery, name: str, scene: Scene, count: int, rng: random.Random
) -> Iterator[Item]:
    """Ellipses, boxes and polygons on a background, some of them labelled."""
    for number in range(count):
        width, height = scene.size(rng)
        scale = min(1.0, SIDE / max(width, height))
        small = max(8, round(width * scale)), max(8, round(height * scale))
        image = background(scene.background, small, rng)
        canvas = ImageDraw.Draw(image)
        boxes = []
        for _ in range(rng.randint(*scene.drawn)):
            box = _somewhere(scene, rng)
            pixels = [share * small[axis % 2] for axis, share in enumerate(box)]
            _object(canvas, pixels, rng)
            boxes.append(tuple(share * (width, height)[axis % 2] for axis, share in enumerate(box)))
        path = gallery.add(f"{name}/{number}", image)
        yield Item(path, (height, width), tuple(boxes[-scene.labelled :]))


def _somewhere(scene: Scene, rng: random.Random) -> Corners:
    left, top, right, bottom = scene.place
    across = min(rng.uniform(*scene.extent), right - left)
    down = min(rng.uniform(*scene.extent), bottom - top)
    x, y = rng.uniform(left, right - across), rng.uniform(top, bottom - down)
    return x, y, x + across, y + down


def _object(canvas: ImageDraw.ImageDraw, box: list[float], rng: random.Random) -> None:
    x1, y1, x2, y2 = box
    x2, y2 = max(x2, x1 + 2), max(y2, y1 + 2)
    fill = tuple(rng.randrange(256) for _ in range(3))
    kind = rng.choice(("ellipse", "rectangle", "triangle", "diamond"))
    if kind == "ellipse":
        canvas.ellipse((x1, y1, x2, y2), fill=fill)
    elif kind == "rectangle":
        canvas.rectangle((x1, y1, x2, y2), fill=fill)
    elif kind == "triangle":
        canvas.polygon(((x1, y2), (x2, y2), (rng.uniform(x1, x2), y1)), fill=fill)
    else:
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        corners = ((middle[0], y1), (x2, middle[1]), (middle[0], y2), (x1, middle[1]))
        canvas.polygon(corners, fill=fill)


def background(kind: str, size: Size, rng: random.Random) -> Image.Image:
    """rough: blurred noise, coarse and fine. bricks: a pattern that repeats. plain: one colour."""
    width, height = size
    if kind == "plain":
        return Image.new("RGB", size, tuple(rng.randint(190, 255) for _ in range(3)))
    noise = np.random.default_rng(rng.randrange(2**32))
    if kind == "bricks":
        pitch = rng.randint(14, 24)
        y, x = np.mgrid[0:height, 0:width]
        lines = ((y % pitch) < 2) | (((x + pitch * (y // pitch % 2)) % (2 * pitch)) < 2)
        grey = np.where(lines, 200, 120) + noise.normal(0, 6, (height, width))
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    coarse = noise.integers(60, 200, (5, 5, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    fine = noise.normal(0, rng.uniform(2, 18), (height, width, 1))
    rough = (np.asarray(image) + fine).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rough).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


@dataclass(frozen=True)
class Page:
    """How to set text: the page's size, the width of the text (share), the height of a line
    (share), whether words or whole lines are labelled, and how much wider a box is drawn (share of
    the line's height)."""

    size: Callable[[random.Random], Size]
    column: tuple[float, float] = (0.08, 0.92)
    line: tuple[float, float] = (0.02, 0.035)
    words: bool = False
    loose: float = 0.0


def pages(
    gallery: Gallery, name: str, page: Page, count: int, rng: random.Random
) -> Iterator[Item]:
    """Lines of dark text on a pale page; one to three words or lines of it labelled."""
    for number in range(count):
        width, height = page.size(rng)
        scale = min(1.0, 1.5 * SIDE / max(width, height))
        small = round(width * scale), round(height * scale)
        image = background("plain", small, rng)
        found = list(_lines(ImageDraw.Draw(image), small, page, rng))
        chosen = rng.sample(found, min(len(found), rng.randint(1, 3)))
        margin = page.loose * (chosen[0][3] - chosen[0][1])
        boxes = tuple(
            (
                max(x1 - margin, 0) / scale,
                max(y1 - margin, 0) / scale,
                min(x2 + margin, small[0]) / scale,
                min(y2 + margin, small[1]) / scale,
            )
            for x1, y1, x2, y2 in chosen
        )
        yield Item(gallery.add(f"{name}/{number}", image), (height, width), boxes)


def _lines(
    canvas: ImageDraw.ImageDraw, size: Size, page: Page, rng: random.Random
) -> Iterator[Corners]:
    width, height = size
    letters = max(7.0, rng.uniform(*page.line) * height)
    font = ImageFont.load_default(letters)
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    left, right = (share * width for share in page.column)
    y = rng.uniform(0.02, 0.1) * height
    while y + 1.3 * letters < 0.97 * height:
        x, words = left + rng.choice((0, 0, rng.uniform(0, 0.3) * (right - left))), []
        for _ in range(rng.randint(1, 6)):
            text = "".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9)))
            box = canvas.textbbox((x, y), text, font=font)
            if box[2] > right:
                break
            canvas.text((x, y), text, fill=ink, font=font)
            words.append(box)
            x = box[2] + 0.4 * letters
        if words and page.words:
            yield rng.choice(words)
        elif words:
            tops, bottoms = [box[1] for box in words], [box[3] for box in words]
            yield words[0][0], min(tops), words[-1][2], max(bottoms)
        y += letters * rng.choice((1.3, 1.3, 2.0))
