"""Real and generated sources of boxes for benchmarks, held in memory."""

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

from finesight.ingest.check.box_hypothesis import MAX_SIDE, EdgeContrast, load_small_gray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from shape_images import COLORS, SHAPES, ColoredShape, draw_shapes

BoxCorners = tuple[float, float, float, float]
ImageSize = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class BoxSample:
    """A sample: image name, size (height, width) and reference boxes in pixels."""

    image: Path
    size: tuple[int, int]
    boxes: tuple[BoxCorners, ...]


class ImageGallery:
    """Images by name.

    Small gray copies of generated images are held in memory. Edge sums are large; `clear_edge_sums`
    frees them.
    """

    def __init__(self) -> None:
        self._gray_copies: dict[Path, NDArray[np.uint8]] = {}
        self._edge_sums: dict[Path, EdgeContrast] = {}

    def add(self, name: str, image: Image.Image) -> Path:
        """Add a generated image."""
        path = Path(name)
        if max(image.size) > MAX_SIDE:
            image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
        self._gray_copies[path] = np.asarray(image.convert("L"))
        return path

    def edge_sums(self, path: Path) -> EdgeContrast:
        """Return the edge sums of a generated image or of a file, which is read once."""
        if path not in self._edge_sums:
            if path not in self._gray_copies:
                self._gray_copies[path] = load_small_gray(path)
            self._edge_sums[path] = EdgeContrast(self._gray_copies[path])
        return self._edge_sums[path]

    def clear_edge_sums(self) -> None:
        """Free the edge sums."""
        self._edge_sums.clear()


def load_real_sources(folder: Path) -> dict[str, list[BoxSample]]:
    """Load the real sources: words in photographs, receipt lines, objects in photographs."""
    sources: dict[str, list[BoxSample]] = {"words": [], "receipts": [], "objects": []}
    for line in (folder / "grounding/grounding.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        name = "words" if row["source"] == "icdar2015" else "receipts"
        size = row["height"], row["width"]
        item = BoxSample(folder / "grounding" / row["image"], size, (tuple(row["bbox_xyxy"]),))
        sources[name].append(item)
    for line in (folder / "captions/captions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        labels: dict[str, list[BoxCorners]] = {}
        for one in row["objects"]:
            labels.setdefault(one["label"], []).append(tuple(one["bbox_xyxy"]))
        size = row["height"], row["width"]
        path = folder / "captions" / row["image"]
        sources["objects"] += [BoxSample(path, size, tuple(boxes)) for boxes in labels.values()]
    sources["words and receipts"] = sources["words"] + sources["receipts"]
    return sources


def draw_quickstart_scenes(
    gallery: ImageGallery, count: int, rng: random.Random
) -> Iterator[BoxSample]:
    """Generate shapes in the cells of a small square image."""
    for number in range(count):
        cells = rng.sample(range(9), rng.randint(1, 2))
        shapes = []
        for cell in cells:
            size = rng.choice((40, 52))
            x, y = (offset * 56 + (56 - size) // 2 for offset in divmod(cell, 3))
            colour = rng.choice(tuple(COLORS))
            shapes.append(ColoredShape(colour, rng.choice(SHAPES), (x, y, x + size, y + size)))
        path = gallery.add(f"quickstart/{number}", draw_shapes(shapes, (230, 240, 220)))
        yield BoxSample(path, (168, 168), tuple(shape.xyxy for shape in shapes))


@dataclass(frozen=True)
class SceneStyle:
    """Style of a scene: image size, position and size of boxes as fractions of the image, number of
    drawn and labeled objects, background."""

    size: Callable[[random.Random], ImageSize]
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    box_extent: tuple[float, float] = (0.08, 0.45)
    num_objects: tuple[int, int] = (2, 6)
    num_labelled: int = 3
    background: str = "rough"


def draw_scenes(
    gallery: ImageGallery, name: str, style: SceneStyle, count: int, rng: random.Random
) -> Iterator[BoxSample]:
    """Generate ellipses, rectangles and polygons on a background, some of them labeled."""
    for number in range(count):
        width, height = style.size(rng)
        scale = min(1.0, MAX_SIDE / max(width, height))
        small = max(8, round(width * scale)), max(8, round(height * scale))
        image = draw_background(style.background, small, rng)
        canvas = ImageDraw.Draw(image)
        boxes = []
        for _ in range(rng.randint(*style.num_objects)):
            box = _random_box(style, rng)
            pixels = [share * small[axis % 2] for axis, share in enumerate(box)]
            _draw_object(canvas, pixels, rng)
            boxes.append(tuple(share * (width, height)[axis % 2] for axis, share in enumerate(box)))
        path = gallery.add(f"{name}/{number}", image)
        yield BoxSample(path, (height, width), tuple(boxes[-style.num_labelled :]))


def _random_box(style: SceneStyle, rng: random.Random) -> BoxCorners:
    left, top, right, bottom = style.region
    across = min(rng.uniform(*style.box_extent), right - left)
    down = min(rng.uniform(*style.box_extent), bottom - top)
    x, y = rng.uniform(left, right - across), rng.uniform(top, bottom - down)
    return x, y, x + across, y + down


def _draw_object(canvas: ImageDraw.ImageDraw, box: list[float], rng: random.Random) -> None:
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


def draw_background(kind: str, size: ImageSize, rng: random.Random) -> Image.Image:
    """Draw a background: `rough` (blurred noise), `bricks` (repeated pattern) or one color."""
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
class PageStyle:
    """Style of a page: page size, text width, line height (fractions), label unit (words or lines)
    and box margin as a fraction of the line height."""

    size: Callable[[random.Random], ImageSize]
    column_extent: tuple[float, float] = (0.08, 0.92)
    line_height: tuple[float, float] = (0.02, 0.035)
    label_words: bool = False
    box_padding: float = 0.0


def draw_pages(
    gallery: ImageGallery, name: str, style: PageStyle, count: int, rng: random.Random
) -> Iterator[BoxSample]:
    """Generate pages of dark text on a light background with labeled words or lines."""
    for number in range(count):
        width, height = style.size(rng)
        scale = min(1.0, 1.5 * MAX_SIDE / max(width, height))
        small = round(width * scale), round(height * scale)
        image = draw_background("plain", small, rng)
        found = list(_draw_lines(ImageDraw.Draw(image), small, style, rng))
        chosen = rng.sample(found, min(len(found), rng.randint(1, 3)))
        margin = style.box_padding * (chosen[0][3] - chosen[0][1])
        boxes = tuple(
            (
                max(x1 - margin, 0) / scale,
                max(y1 - margin, 0) / scale,
                min(x2 + margin, small[0]) / scale,
                min(y2 + margin, small[1]) / scale,
            )
            for x1, y1, x2, y2 in chosen
        )
        yield BoxSample(gallery.add(f"{name}/{number}", image), (height, width), boxes)


def _draw_lines(
    canvas: ImageDraw.ImageDraw, size: ImageSize, style: PageStyle, rng: random.Random
) -> Iterator[BoxCorners]:
    width, height = size
    font_size = max(7.0, rng.uniform(*style.line_height) * height)
    font = ImageFont.load_default(font_size)
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    left, right = (share * width for share in style.column_extent)
    y = rng.uniform(0.02, 0.1) * height
    while y + 1.3 * font_size < 0.97 * height:
        x, words = left + rng.choice((0, 0, rng.uniform(0, 0.3) * (right - left))), []
        for _ in range(rng.randint(1, 6)):
            text = "".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9)))
            box = canvas.textbbox((x, y), text, font=font)
            if box[2] > right:
                break
            canvas.text((x, y), text, fill=ink, font=font)
            words.append(box)
            x = box[2] + 0.4 * font_size
        if words and style.label_words:
            yield rng.choice(words)
        elif words:
            tops, bottoms = [box[1] for box in words], [box[3] for box in words]
            yield words[0][0], min(tops), words[-1][2], max(bottoms)
        y += font_size * rng.choice((1.3, 1.3, 2.0))
