"""Images embedded in pages as data URLs."""

from __future__ import annotations

import base64
import io
from typing import TypedDict

from PIL import Image

JPEG_QUALITY = 88
"""Default JPEG quality of embedded images."""

MAX_PNG_COLORS = 4096
"""Images with more colors are encoded as JPEG only. PNG would be slow and larger."""


class InlineImage(TypedDict):
    """Argument of `drawImage` in `base.js`: data URL, and the size to which boxes refer."""

    src: str
    width: int
    height: int


def build_inline_image(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> InlineImage:
    """Embed an RGB image with sides of at most `max_side`. Boxes refer to `image`."""
    data_url = encode_data_url(image, max_side, quality)
    return InlineImage(src=data_url, width=image.width, height=image.height)


def encode_data_url(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> str:
    """Encode an RGB image as a data URL: PNG or JPEG, whichever is smaller.

    The image is shrunk to sides of at most `max_side`, and never enlarged.
    """
    assert image.mode == "RGB", f"image mode is {image.mode}, not RGB"
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    image_format, encoded = "jpeg", _encode_image(image, "JPEG", quality=quality)
    if image.getcolors(MAX_PNG_COLORS) is not None:
        png = _encode_image(image, "PNG")
        image_format, encoded = (
            ("png", png) if len(png) <= len(encoded) else (image_format, encoded)
        )
    return f"data:image/{image_format};base64,{base64.b64encode(encoded).decode()}"


def _encode_image(image: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
