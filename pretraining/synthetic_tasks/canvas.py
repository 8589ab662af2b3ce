"""Canvas of synthetic images: text with bounding boxes."""

from __future__ import annotations

import math
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
        mask, x1, y1 = _draw_mask(text, font)
        center_x, center_y = left + x1 - 1 + mask.width / 2, baseline + y1 - 1 + mask.height / 2
        if self.angle:
            center_x, center_y = self._rotate_point(center_x, center_y)
            mask = mask.rotate(self.angle, Image.Resampling.BICUBIC, expand=True)
        return mask, (round(center_x - mask.width / 2), round(center_y - mask.height / 2))

    def _rotate_point(self, x: float, y: float) -> tuple[float, float]:
        middle_x, middle_y = self.image.width / 2, self.image.height / 2
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        dx, dy = x - middle_x, y - middle_y
        return middle_x + dx * cosine + dy * sine, middle_y - dx * sine + dy * cosine


@lru_cache(256)  # Synthetic documents repeat most texts.
def _draw_mask(text: str, font: ImageFont.FreeTypeFont) -> tuple[Image.Image, int, int]:
    """Return the coverage mask of a text, and the left and upper edge of its ink."""
    x1, y1, x2, y2 = (round(number) for number in font.getbbox(text, anchor="ls"))
    mask = Image.new("L", (max(1, x2 - x1) + 2, max(1, y2 - y1) + 2))
    ImageDraw.Draw(mask).text((1 - x1, 1 - y1), text, 255, font, anchor="ls")
    return mask, x1, y1
