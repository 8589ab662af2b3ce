"""Pictures as text: data that a page holds within itself."""

from __future__ import annotations

import base64
import io
from typing import TypedDict

from PIL import Image

QUALITY = 88
"""Of JPEG, where it is smaller than PNG: photographs. Lower for many small pictures."""

FEW_COLOURS = 4096
"""Pictures of more colours are photographs: trying PNG on them is slow and in vain."""


class Picture(TypedDict):
    """What `drawPicture` of `base.js` takes: `src`, and the frame in which boxes are given."""

    src: str
    width: int
    height: int


def picture(image: Image.Image, max_side: int | None = None, quality: int = QUALITY) -> Picture:
    """An RGB picture for a page, sides at most `max_side`; boxes stay in pixels of `image`."""
    source = picture_data(image, max_side, quality)
    return Picture(src=source, width=image.width, height=image.height)


def picture_data(image: Image.Image, max_side: int | None = None, quality: int = QUALITY) -> str:
    """An RGB picture as a `data:` address: PNG or JPEG, whichever is smaller.

    It is shrunk so that no side is longer than `max_side`, and never enlarged.
    """
    assert image.mode == "RGB", f"a picture of mode {image.mode}, not RGB"
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    kind, smaller = "jpeg", _saved(image, "JPEG", quality=quality)
    if image.getcolors(FEW_COLOURS) is not None:
        png = _saved(image, "PNG")
        kind, smaller = ("png", png) if len(png) <= len(smaller) else (kind, smaller)
    return f"data:image/{kind};base64,{base64.b64encode(smaller).decode()}"


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
