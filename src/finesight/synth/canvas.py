"""Drawing of synthetic images: backgrounds, text with bounding boxes, and camera noise."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

PixelBox = tuple[int, int, int, int]
"""Bounding box in pixels: x1, y1 (inclusive), x2, y2 (exclusive)."""

INK_THRESHOLD = 64
"""Minimum coverage (0 to 255) of a pixel that belongs to the bounding box of a word."""

INK_LOOKUP = [255 if cover >= INK_THRESHOLD else 0 for cover in range(256)]
"""Lookup table that maps coverage to 255 for pixels of the bounding box and to 0 for others."""

TOKEN_SIZE = 28
"""Side length in pixels of the image area that becomes one token."""


@dataclass(frozen=True)
class RenderedWord:
    """A drawn word and its bounding box in pixels."""

    text: str
    box: PixelBox


@dataclass
class Canvas:
    """A synthetic image while it is drawn.

    Attributes:
        angle: Rotation of texts about the image center in degrees, counterclockwise.
    """

    image: Image.Image
    background: Color
    angle: float = 0.0

    def draw_text(
        self, text: str, font: ImageFont.FreeTypeFont, left: float, baseline: float, ink: Color
    ) -> RenderedWord | None:
        """Draw a text unless it exceeds the canvas or has no visible pixels.

        `left` and `baseline` are the position of the text before rotation.

        Returns:
            The text with its bounding box, or None if nothing was drawn.
        """
        mask, (x, y) = self._render_text(text, font, left, baseline)
        ink_bounds = mask.point(INK_LOOKUP).getbbox()
        if ink_bounds is None:
            return None
        box = (ink_bounds[0] + x, ink_bounds[1] + y, ink_bounds[2] + x, ink_bounds[3] + y)
        width, height = self.image.size
        if min(box) < 1 or box[2] >= width or box[3] >= height:
            return None
        self.image.paste(ink, (x, y), mask)
        return RenderedWord(text, box)

    def _render_text(
        self, text: str, font: ImageFont.FreeTypeFont, left: float, baseline: float
    ) -> tuple[Image.Image, tuple[int, int]]:
        """Return the coverage mask of a text and the position of its upper left corner."""
        x1, y1, x2, y2 = (round(number) for number in font.getbbox(text, anchor="ls"))
        size = (max(1, x2 - x1) + 2, max(1, y2 - y1) + 2)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).text((1 - x1, 1 - y1), text, 255, font, anchor="ls")
        center_x, center_y = left + x1 - 1 + size[0] / 2, baseline + y1 - 1 + size[1] / 2
        if self.angle:
            center_x, center_y = self._rotate_point(center_x, center_y)
            mask = mask.rotate(self.angle, Image.Resampling.BICUBIC, expand=True)
        return mask, (round(center_x - mask.width / 2), round(center_y - mask.height / 2))

    def _rotate_point(self, x: float, y: float) -> tuple[float, float]:
        middle_x, middle_y = self.image.width / 2, self.image.height / 2
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        dx, dy = x - middle_x, y - middle_y
        return middle_x + dx * cosine + dy * sine, middle_y - dx * sine + dy * cosine


def compute_luma(color: Color) -> float:
    """Compute the luma (ITU-R BT.601) of a color, 0 to 255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def sample_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


@lru_cache
def load_builtin_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that Pillow contains at a size in pixels per em.

    The basic layout engine of Pillow is used, so that the output does not depend on other
    libraries.
    """
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def make_canvas(size: tuple[int, int], rng: random.Random, pale_fraction: float = 0.6) -> Canvas:
    """Create a canvas with a uniform or textured background.

    Args:
        size: Width and height in pixels.
        pale_fraction: Probability of a pale background color; others have any color.
    """
    pale_color = (
        tuple(rng.randint(205, 255) for _ in range(3)) if rng.random() < pale_fraction else None
    )
    red, green, blue = pale_color or sample_color(rng)
    if 100 < compute_luma((red, green, blue)) < 155:
        # No ink has sufficient contrast on paper of medium brightness.
        red, green, blue = (min(255, channel + 70) for channel in (red, green, blue))
    base_color: Color = (red, green, blue)
    share = rng.random()
    if share < 0.45:
        image = Image.new("RGB", size, base_color)
    elif share < 0.7:
        image = _make_gradient(size, base_color, rng)
    elif share < 0.9:
        image = _make_blotches(size, base_color, rng)
    else:
        image = _make_lines(size, base_color, rng)
    return Canvas(image, base_color)


def round_up_size(width: int, height: int, rng: random.Random) -> tuple[int, int]:
    """Round an image size up to multiples of the token size, in most samples.

    The processor does not resize such images.
    """
    if rng.random() < 0.05:
        return width, height
    return -(-width // TOKEN_SIZE) * TOKEN_SIZE, -(-height // TOKEN_SIZE) * TOKEN_SIZE


def _jitter_color(color: Color, max_delta: int, rng: random.Random) -> Color:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-max_delta, max_delta))) for channel in color
    )
    return red, green, blue


def _make_gradient(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background with a color gradient."""
    corners = Image.new("RGB", (2, 2))
    for x in range(2):
        for y in range(2):
            corners.putpixel((x, y), _jitter_color(color, 28, rng))
    return corners.resize(size, Image.Resampling.BILINEAR)


def _make_blotches(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background of soft spots in similar colors, like an out-of-focus wall."""
    cells = (rng.randint(3, 9), rng.randint(3, 9))
    spots = Image.new("RGB", cells)
    spots.putdata([_jitter_color(color, 26, rng) for _ in range(cells[0] * cells[1])])
    return spots.resize(size, Image.Resampling.BICUBIC)


def _make_lines(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background of ruled or checked paper, planks or tiles."""
    image = Image.new("RGB", size, color)
    draw, line = ImageDraw.Draw(image), _jitter_color(color, 30, rng)
    gap, thickness = rng.randint(8, 30), rng.randint(1, 3)
    is_vertical = rng.random() < 0.5
    for offset in range(rng.randrange(gap), size[0] if is_vertical else size[1], gap):
        ends = ((offset, 0), (offset, size[1])) if is_vertical else ((0, offset), (size[0], offset))
        draw.line(ends, line, thickness)
    return image
