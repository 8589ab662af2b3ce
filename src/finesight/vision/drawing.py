"""Built-in font and drawings of synthetic images."""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont


def draw_red_rectangle(size: tuple[int, int], box: tuple[float, float, float, float]) -> bytes:
    """Return a white PNG image of a height and width with a filled red rectangle, in pixels."""
    buffer, drawing = io.BytesIO(), Image.new("RGB", size[::-1], "white")
    ImageDraw.Draw(drawing).rectangle(box, fill="red")
    drawing.save(buffer, format="PNG")
    return buffer.getvalue()


@lru_cache
def load_builtin_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that Pillow contains at a size in pixels per em.

    The basic layout engine of Pillow is used, so that the output does not depend on other
    libraries.
    """
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
